"""Operations of the host on a KV cache in host memory: append, submit, collect."""

from __future__ import annotations

from host_ops.api import Implementation as Implementation
from host_ops.api import append as append
from host_ops.api import available as available
from host_ops.api import chosen as chosen
from host_ops.api import collect as collect
from host_ops.api import submit as submit
from host_ops.control import cancel as cancel
from host_ops.control import drain as drain
from host_ops.control import inject_fault as inject_fault
from host_ops.control import new_cancel_word as new_cancel_word
from host_ops.control import release_cancel_word as release_cancel_word
from host_ops.control import spread as spread
from host_ops.errors import UnavailableError as UnavailableError
from host_ops.host_view import host_view as host_view
from host_ops.memory import DEVICE as DEVICE
from host_ops.memory import HOST as HOST
from host_ops.memory import retag as retag
from host_ops.types import STATUS_CANCELLED as STATUS_CANCELLED
from host_ops.types import STATUS_INTERNAL as STATUS_INTERNAL
from host_ops.types import STATUS_INVALID as STATUS_INVALID
from host_ops.types import STATUS_NOT_IN_PLACE as STATUS_NOT_IN_PLACE
from host_ops.types import STATUS_OK as STATUS_OK
from host_ops.types import STATUS_TIMEOUT as STATUS_TIMEOUT
from host_ops.types import TIMES as TIMES
from host_ops.types import Collected as Collected
from host_ops.types import Flush as Flush
from host_ops.types import Tick as Tick
from host_ops.types import Work as Work
from host_ops.xla_append import write_summaries as write_summaries
