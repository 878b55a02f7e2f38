"""Decoder-only models in Flax NNX and their loaders."""

from fluxion_jax.models.config import ModelConfig as ModelConfig
from fluxion_jax.models.decoder import Decoder as Decoder
from fluxion_jax.models.load import LoadedModel as LoadedModel
from fluxion_jax.models.load import load_model as load_model
from fluxion_jax.models.tokenizer import Tokenizer as Tokenizer
