"""altmoe: frozen single-modality encoders joined by one mixture-of-experts connector."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_altmoe import AltMoEConfig
from .encoding_altmoe import LatentProtocol
from .latents_altmoe import LatentStore
from .modeling_altmoe import AltMoEModel, AltMoEOutput
from .processing_altmoe import AltMoEProcessor

AutoConfig.register("altmoe", AltMoEConfig, exist_ok=True)
AutoModel.register(AltMoEConfig, AltMoEModel, exist_ok=True)
AutoProcessor.register(AltMoEConfig, AltMoEProcessor, exist_ok=True)
AltMoEConfig.register_for_auto_class()
AltMoEModel.register_for_auto_class("AutoModel")
AltMoEProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["AltMoEConfig", "AltMoEModel", "AltMoEOutput", "AltMoEProcessor", "LatentProtocol", "LatentStore"]
