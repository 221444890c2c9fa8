"""altmoe: frozen single-modality encoders joined by one mixture-of-experts connector."""

from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_altmoe import AltMoEConfig
from .encoding_altmoe import LatentProtocol
from .latents_altmoe import LatentStore
from .modeling_altmoe import AltMoEModel, AltMoEOutput
from .pipeline_altmoe import TASK, CrossModalRetrievalPipeline
from .processing_altmoe import AltMoEProcessor

AutoConfig.register("altmoe", AltMoEConfig, exist_ok=True)
AutoModel.register(AltMoEConfig, AltMoEModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(AltMoEConfig, AltMoEModel, exist_ok=True)
AutoProcessor.register(AltMoEConfig, AltMoEProcessor, exist_ok=True)
AltMoEConfig.register_for_auto_class()
AltMoEModel.register_for_auto_class("AutoModel")
AltMoEProcessor.register_for_auto_class("AutoProcessor")
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=CrossModalRetrievalPipeline, pt_model=AutoModel)

__all__ = [
    "AltMoEConfig",
    "AltMoEModel",
    "AltMoEOutput",
    "AltMoEProcessor",
    "CrossModalRetrievalPipeline",
    "LatentProtocol",
    "LatentStore",
]
