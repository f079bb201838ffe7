"""Makes transformers know this package: Auto classes and `pipeline("visual-question-answering")`."""


def register() -> None:
    """Register the Auto classes and the pipeline task; calling it again changes nothing."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto.modeling_auto import AutoModelForVisualQuestionAnswering
    from transformers.pipelines import PIPELINE_REGISTRY, REMOVED_TASKS

    from .configuration import SDLlavaConfig, SDLlavaDiffusionConfig
    from .diffusion import SDLlavaDiffusionModel
    from .hub.push import push_model, push_processor
    from .modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaModel, SDLlavaPreTrainedModel
    from .pipeline import VisualQuestionAnsweringPipeline
    from .processors import SDLlavaProcessor

    for config in (SDLlavaConfig, SDLlavaDiffusionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(SDLlavaConfig, SDLlavaModel, exist_ok=True)
    AutoModel.register(SDLlavaDiffusionConfig, SDLlavaDiffusionModel, exist_ok=True)
    # the code that travels with a checkpoint has no card to make; there, transformers' own methods serve
    SDLlavaPreTrainedModel.push_to_hub = push_model
    SDLlavaProcessor.push_to_hub = push_processor
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForVisualQuestionAnswering):
        auto.register(SDLlavaConfig, SDLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SDLlavaConfig, SDLlavaProcessor, exist_ok=True)

    # transformers 5 removed the task and refuses its name before it looks at registered pipelines
    REMOVED_TASKS.pop("visual-question-answering", None)
    REMOVED_TASKS.pop("vqa", None)
    PIPELINE_REGISTRY.task_aliases["vqa"] = "visual-question-answering"
    if "visual-question-answering" not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            "visual-question-answering",
            pipeline_class=VisualQuestionAnsweringPipeline,
            pt_model=AutoModelForImageTextToText,
            type="multimodal",
        )
