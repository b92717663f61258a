"""kvjax compresses the key/value cache of large language models in JAX."""

from kvjax.accounting import device_bytes
from kvjax.cache import KVCache
from kvjax.decoding import compressed_decode, init_cache, pin_prompt, prefill
from kvjax.errors import UserError
from kvjax.generation import Generator, generate
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.sampling import Sampling
from kvjax.sharding import make_mesh
from kvjax.statistics import Statistics
from kvjax.statistics_file import load_statistics
from kvjax.text import Tokenizer, load_tokenizer

__all__ = [
    "Generator",
    "KVCache",
    "Policy",
    "Sampling",
    "Statistics",
    "Tokenizer",
    "UserError",
    "compressed_decode",
    "device_bytes",
    "generate",
    "init_cache",
    "load_statistics",
    "load_tokenizer",
    "make_mesh",
    "parse_policy",
    "pin_prompt",
    "prefill",
]
