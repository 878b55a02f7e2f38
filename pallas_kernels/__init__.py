"""Device kernels of hybrid sparse decode attention, each with an XLA version of the same signature.

Plain arrays in, plain arrays out; nothing here knows of caches or policies.
"""

from pallas_kernels.bitmaps import at_or_above as at_or_above
from pallas_kernels.bitmaps import group_union as group_union
from pallas_kernels.bitmaps import num_words as num_words
from pallas_kernels.bitmaps import pack as pack
from pallas_kernels.bitmaps import popcount as popcount
from pallas_kernels.bitmaps import unpack as unpack
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.block_sparse_attention import share_attention as share_attention
from pallas_kernels.by_sequence import HEADS as HEADS
from pallas_kernels.by_sequence import Heads as Heads
from pallas_kernels.by_sequence import OfGroups as OfGroups
from pallas_kernels.by_sequence import by_sequence as by_sequence
from pallas_kernels.copy_blocks import copy_blocks as copy_blocks
from pallas_kernels.dense_layer import dense_layer as dense_layer
from pallas_kernels.divide_work import Division as Division
from pallas_kernels.divide_work import divide_work as divide_work
from pallas_kernels.finish_layer import SummaryUpdate as SummaryUpdate
from pallas_kernels.finish_layer import finish_layer as finish_layer
from pallas_kernels.head_statistics import HeadStatistics as HeadStatistics
from pallas_kernels.head_statistics import head_statistics as head_statistics
from pallas_kernels.head_statistics_triton import LARGEST_ODDS as LARGEST_ODDS
from pallas_kernels.merge_states import merge_states as merge_states
from pallas_kernels.query_triton import quantise_query as quantise_query
from pallas_kernels.registry import Implementation as Implementation
from pallas_kernels.registry import (
    UnsupportedImplementationError as UnsupportedImplementationError,
)
from pallas_kernels.scoring import num_units as num_units
from pallas_kernels.scoring import score_units as score_units
from pallas_kernels.selection import select_units as select_units
from pallas_kernels.update_summaries import update_summaries as update_summaries
from pallas_kernels.window_attention import window_attention as window_attention
from pallas_kernels.window_scores import window_scores as window_scores
from pallas_kernels.window_step import WindowStep as WindowStep
from pallas_kernels.window_step import window_step as window_step
