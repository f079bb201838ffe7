"""Makes transformers know this package: Auto classes, `pipeline("visual-question-answering")`, pushing with a card."""


def register() -> None:
    """Register the Auto classes, the pipeline task and the Hub's hooks; calling it again changes nothing.

    The first use of a public name of `sdllava` calls it.

    Raises:
        ImportError: transformers no longer has what the pipeline task needs.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto.modeling_auto import AutoModelForVisualQuestionAnswering

    from .configuration import SDLlavaConfig, SDLlavaDiffusionConfig
    from .diffusion import SDLlavaDiffusionModel
    from .hub.push import push_files, push_folder
    from .image_model import SDLlavaPreTrainedModel
    from .modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaModel
    from .processors import SDLlavaProcessor

    for config in (SDLlavaConfig, SDLlavaDiffusionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(SDLlavaConfig, SDLlavaModel, exist_ok=True)
    AutoModel.register(SDLlavaDiffusionConfig, SDLlavaDiffusionModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForVisualQuestionAnswering):
        auto.register(SDLlavaConfig, SDLlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SDLlavaConfig, SDLlavaProcessor, exist_ok=True)
    SDLlavaPreTrainedModel.push_folder = staticmethod(push_folder)
    SDLlavaProcessor.push_files = staticmethod(push_files)
    _register_pipeline()
    SDLlavaConfig.pipeline_is_registered = True


def _register_pipeline() -> None:
    """Give transformers the task "visual-question-answering" again.

    transformers 5 removed the task and rejects its name before it looks up registered pipelines, so the name has to be
    taken out of its table of removed tasks. This is the only place that changes transformers' own tables.
    """
    from transformers import AutoModelForImageTextToText

    from .pipeline import VisualQuestionAnsweringPipeline

    task = "visual-question-answering"
    try:
        from transformers.pipelines import PIPELINE_REGISTRY, REMOVED_TASKS

        for name in (task, "vqa"):
            REMOVED_TASKS.pop(name, None)
        PIPELINE_REGISTRY.task_aliases["vqa"] = task
        supported = PIPELINE_REGISTRY.supported_tasks
    except (ImportError, AttributeError) as error:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} does not have the pipeline registry that sdllava registers "
            f"{task!r} in ({error}). Install a version in the range of sdllava's requirements."
        ) from error
    if task not in supported:
        PIPELINE_REGISTRY.register_pipeline(
            task,
            pipeline_class=VisualQuestionAnsweringPipeline,
            pt_model=AutoModelForImageTextToText,
            type="multimodal",
        )
