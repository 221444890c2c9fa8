"""AltMoEModel as search and evaluation see it: query vectors, gallery vectors, and how their scores are post-processed.

Comes in: latents. Goes out: unit vectors, scores, confidence; the rules themselves are `scoring_altmoe`'s. What is measured on
training and validation data is kept in `config.scoring` and, where it is tensors, in `score_banks`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .confidence_altmoe import Calibration
from .configuration_altmoe import AltMoEConfig
from .connector_altmoe import ScoreBank
from .scoring_altmoe import Postprocessing, reverse_direction, score_matrix


class RetrieverMixin:
    """The half of [`AltMoEModel`] that is a `scoring_altmoe.Retriever`."""

    @staticmethod
    def empty_banks(config: AltMoEConfig) -> nn.ModuleDict:
        """Banks of the sizes that a configuration tells, to be filled by its checkpoint."""
        banks = nn.ModuleDict()
        for direction, settings in config.scoring.items():
            size = config.latent_size(config.resolve(direction)[1])
            banks[direction] = ScoreBank(*settings["bank"], size, settings.get("known", 0))
        return banks

    def queries(self, direction: str, latents: dict[str, torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Unit query vectors `(batch, latent_size of the target)`: their dot product with `gallery` is the score."""
        (contrastive, regression), _ = self._run(latents, direction)
        # with alpha = 1 the contrastive prediction has never been trained
        return F.normalize(contrastive if self.config.alpha < 1 else regression, dim=-1)

    def gallery(self, direction: str, latents: torch.Tensor) -> torch.Tensor:
        """Stored target latents `(n, latent_size)` -> centred unit vectors, ready to be searched."""
        _, target = self.config.resolve(direction)
        self._check_latents(target, latents)
        return self.connector.frames[target].unit(latents)

    def set_scoring(self, direction: str, post: Postprocessing) -> None:
        """Keep what `fit_postprocessing` measured for a direction: it is saved with the model and used in search."""
        size = self.config.latent_size(self.config.resolve(direction)[1])
        nothing = torch.zeros(0, size)
        queries, gallery = post.query_bank.get(direction, nothing), post.gallery_bank.get(direction, nothing)
        known = post.known.get(direction, ())
        bank = ScoreBank(len(queries), len(gallery), size, len(known)).to(self.device)
        bank.queries.copy_(queries)
        bank.gallery.copy_(gallery)
        if len(known):
            bank.known.copy_(known)
        self.score_banks[direction] = bank
        self.config.scoring[direction] = {
            "scale": post.scales[direction],
            "reverse_weight": post.reverse_weight,
            "beta": post.beta,
            "top_k": post.top_k,
            "bank": [len(queries), len(gallery)],
            "familiarity": post.familiarity,
            "known": len(known),
        }

    def postprocessing(self, direction: str) -> Postprocessing:
        """How scores of a direction are post-processed; the plain cosine until `set_scoring` was called."""
        self.config.resolve(direction)
        settings = self.config.scoring.get(direction)
        if settings is None:
            return Postprocessing()
        names = [name for name in (direction, reverse_direction(direction)) if name in self.config.scoring]
        return Postprocessing(
            scales={name: self.config.scoring[name]["scale"] for name in names},
            reverse_weight=settings["reverse_weight"],
            beta=settings["beta"],
            top_k=settings["top_k"],
            query_bank={name: self.score_banks[name].queries for name in names},
            gallery_bank={name: self.score_banks[name].gallery for name in names},
            familiarity=settings.get("familiarity", 0.0),  # checkpoints of earlier versions have none
            known={name: self.score_banks[name].known for name in names},
        )

    def calibration(self, direction: str) -> Calibration | None:
        """The confidence model of a direction, if one was fitted."""
        self.config.resolve(direction)
        kept = self.config.scoring.get(direction, {}).get("confidence")
        return None if kept is None else Calibration(**kept)

    @torch.no_grad()
    def score(
        self, direction: str, queries: dict[str, torch.Tensor] | torch.Tensor, gallery: torch.Tensor
    ) -> torch.Tensor:
        """Scores `(queries, items)` as search and evaluation use them: both directions, with all corrections.

        Args:
            direction: e.g. `"image->text"`.
            queries: source latents `{modality: (n, latent_size)}`, or the tensor alone.
            gallery: target latents `(m, latent_size)`.
        """
        if isinstance(queries, torch.Tensor):
            queries = {self.config.resolve(direction)[0][0]: queries}
        return score_matrix(self, self.postprocessing(direction), direction, queries, gallery)

    @property
    def directions(self) -> list[str]:
        """The directions this connector was built for."""
        return self.config.directions
