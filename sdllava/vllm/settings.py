"""What vLLM's settings must be for this package's models: the renderer, and head sizes that a CPU's attention has."""

from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

MODE = "sdllava"
"""The mode of tokenizer and renderer of this package's models, which the user need not name."""


class SDLlavaSettings(VerifyAndUpdateConfig):
    """Changes vLLM's configuration of a model before anything is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Choose this package's renderer, and widen the heads where the CPU's attention lacks their size.

        Raises:
            ValueError: The language model's heads have a size that the CPU's attention lacks, and cannot be widened.
        """
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = MODE
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            widen_heads(model_config.hf_config.text_config, CPUAttentionBackend.get_supported_head_sizes())
            model_config.model_arch_config = model_config.get_model_arch_config()


def widen_heads(text_config: Any, sizes: list[int]) -> None:
    """Set the next supported size of attention heads in a language model's configuration, in place.

    The additional channels are zeros, and only the original ones are rotated. `pad_heads` fills the weights.

    Args:
        text_config: Of the language model.
        sizes: The supported sizes, ascending.

    Raises:
        ValueError: No supported size is large enough, or the heads are normalised, which zeros would change.
    """
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if size in sizes:
        return
    wide = next((s for s in sizes if s > size), None)
    if wide is None or text_config.model_type not in ("llama", "mistral", "qwen2"):
        raise ValueError(
            f"Attention heads of {size} channels in a {text_config.model_type!r} model cannot run on a CPU, which has "
            f"{sizes}. Serve the model on a GPU."
        )
    text_config.unpadded_head_dim = size
    text_config.head_dim = wide
    text_config.rope_parameters = {**text_config.rope_parameters, "partial_rotary_factor": size / wide}
