"""Calibration: a predictor of head needs for one model, trained from its own full attention."""

from fluxion_jax.calibration.calibrate import Settings as Settings
from fluxion_jax.calibration.calibrate import calibrate as calibrate
from fluxion_jax.calibration.storage import load_calibration as load_calibration
from fluxion_jax.calibration.storage import model_identity as model_identity
from fluxion_jax.calibration.storage import save_calibration as save_calibration
