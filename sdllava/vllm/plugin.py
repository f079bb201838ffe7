"""What vLLM calls in each of its processes before it reads a model."""

ARCHITECTURE = "SDLlavaForConditionalGeneration"


def register() -> None:
    """Register the configuration, the model, and the renderer that hands the prompt's questions to the processor.

    vLLM calls this several times. The model is imported only when it is used.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from ..registration import register as register_with_transformers
    from .settings import MODE, SDLlavaSettings

    register_with_transformers()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(MODE, f"{__package__}.renderer", "SDLlavaRenderer")
        MODELS_CONFIG_MAP[ARCHITECTURE] = SDLlavaSettings  # vLLM has no function for this table
