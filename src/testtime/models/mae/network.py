"""The network in the shape of a Y: a shared encoder, a decoder, and a head that classifies.

Names of parameters are those of the authors' checkpoints.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from testtime.models.mae.masking import (
    Masking,
    grid_of,
    masked_loss,
    masking,
    patchify,
    require_both,
    targets,
)
from testtime.models.mae.parts import EPS, PatchEmbed, Sizes, stacked
from testtime.models.mae.positions import sincos_table


class Encoder(nn.Module):
    """A ViT whose class token goes first, and that can be run on some patches alone.

    The part that both networks below share; its parameters are drawn there.

    Args:
        image: height and width in pixels, or one number for both.
        patch: side of a patch in pixels.
        sizes: of the transformer, such as ``ENCODERS["large"]``.
        channels: of the images.

    Raises:
        ValueError: patches do not divide the image, or a width is not divisible by 4.
    """

    def __init__(
        self, image: int | tuple[int, int], patch: int, sizes: Sizes, channels: int = 3
    ) -> None:
        super().__init__()
        self.image = (image, image) if isinstance(image, int) else image
        self.patch, self.sizes, self.channels = patch, sizes, channels
        self.grid = grid_of(self.image, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.dim))
        self.pos_embed = self._table(sizes.dim)
        self.patch_embed = PatchEmbed(channels, patch, sizes.dim)
        self.blocks = stacked(sizes)
        self.norm: nn.Module = nn.LayerNorm(sizes.dim, eps=EPS)

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return self.grid[0] * self.grid[1]

    def embed(self, x: Tensor) -> Tensor:
        """Return the patch tokens ``[N, L, D]`` of images ``[N, C, H, W]``, with their positions.

        Raises:
            ValueError: the images are of another size than the network's.
        """
        if x.dim() != 4 or x.shape[1:] != (self.channels, *self.image):
            height, width = self.image
            raise ValueError(
                f"The network takes images [N, {self.channels}, {height}, {width}], but the input "
                f"is {[*x.shape]}. Resize or crop the images, or build the network for their size."
            )
        tokens: Tensor = self.patch_embed(x)
        return tokens + self.pos_embed[:, 1:]

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the encoder's outputs, the class token first.

        Args:
            tokens: of :meth:`embed` ``[B, L, D]``.
            keep: the patches to see, in this order ``[N, K]``, with N a multiple of B: first all
                rows of the first image; none: all patches, row by row.

        Returns:
            ``[N, 1 + K, D]`` after the last norm.
        """
        if keep is not None:
            tokens = _take(tokens, keep)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([first, tokens], dim=1)
        out: Tensor = self.norm(self.blocks(x))
        return out

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's outputs ``[N, 1 + L, D]`` for whole images."""
        return self.encode(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoder's outputs ``[N, 1 + L, D]`` for whole images."""
        return self.features(x)

    def _table(self, dim: int) -> nn.Parameter:
        # Rounded to float32 in the published networks, also where they run in float64.
        table = sincos_table(dim, *self.grid).float().to(torch.get_default_dtype())
        return nn.Parameter(table.unsqueeze(0), requires_grad=False)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw the parameters as the authors do; the patch embedding's bias keeps its default."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)


@dataclass(frozen=True)
class Reconstruction:
    """A masked pass.

    Args:
        loss: the reconstruction loss, a scalar.
        prediction: of every patch ``[N, L, n]``, the visible ones included.
        target: ``[N, L, n]``, or ``[1, L, n]`` for copies of one image.
        latent: the encoder's outputs ``[N, 1 + K, D]``, in the order of ``masking.keep``.
        masking: what was hidden.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    latent: Tensor
    masking: Masking


class MAE(Encoder):
    """A masked autoencoder: an encoder, a decoder, and where wanted a head that classifies.

    ``mae(x)`` are the logits of whole images, ``mae.reconstruct(x, order)`` is a masked pass::

        mae = MAE(224, 16, ENCODERS["large"], DECODER, head=HEADS["base"], normalised=True)

    Freshly made, it is initialised as in the authors' code. The position tables never train.

    Args:
        image: height and width in pixels, or one number for both.
        patch: side of a patch in pixels.
        encoder: its size.
        decoder: its size; none: the network has no decoder.
        head: the size of a ViT-probing head, or ``"linear"``; none: no head.
        classes: number of logits.
        channels: of the images.
        normalised: does the decoder predict pixels normalised patch by patch, or plain ones? None:
            not known; then there is no loss.
        task: what the decoder does: reconstruct, or tell by which of four turns an image was
            turned (the rotation baseline: without mask token and pixel layer).

    Source: He et al., CVPR 2022, arXiv 2111.06377; Gandelsman, Sun, Chen and Efros, "Test-time
    training with masked autoencoders", NeurIPS 2022, arXiv 2209.07522.
    """

    def __init__(
        self,
        image: int | tuple[int, int],
        patch: int,
        encoder: Sizes,
        decoder: Sizes | None = None,
        head: Sizes | Literal["linear"] | None = None,
        classes: int = 1000,
        channels: int = 3,
        normalised: bool | None = None,
        task: Literal["reconstruction", "rotation"] = "reconstruction",
    ) -> None:
        super().__init__(image, patch, encoder, channels)
        self.decoder, self.head_sizes, self.classes = decoder, head, classes
        self.normalised, self.task = normalised, task
        if decoder is not None:
            self.decoder_embed = nn.Linear(encoder.dim, decoder.dim)
            self.decoder_pos_embed = self._table(decoder.dim)
            self.decoder_blocks = stacked(decoder)
            self.decoder_norm = nn.LayerNorm(decoder.dim, eps=EPS)
            if task == "rotation":
                self.rotation_head = nn.Linear(decoder.dim, classes)
            else:
                self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
                self.decoder_pred = nn.Linear(decoder.dim, patch**2 * channels)
        if isinstance(head, Sizes):
            self.classifier_embed = nn.Linear(encoder.dim, head.dim)
            self.classifier_pos_embed = self._table(head.dim)
            self.classifier_blocks = stacked(head)
            self.classifier_norm = nn.LayerNorm(head.dim, eps=EPS)
            self.classifier_pred = nn.Linear(head.dim, classes)
        elif head == "linear":
            self.bn = nn.BatchNorm1d(encoder.dim, affine=False, eps=EPS)
            self.head = nn.Linear(encoder.dim, classes)
        self._initialise()
        if decoder is not None and task == "reconstruction":
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of whole images ``[N, C, H, W]``."""
        return self.classify(self.features(x))

    def classify(self, latent: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` for the encoder's outputs ``[N, T, D]``.

        Raises:
            ValueError: there is no head, or a ViT-probing head gets the tokens of a masked pass.
        """
        if self.head_sizes is None:
            raise ValueError(
                "This masked autoencoder has no head to classify with. Load one beside it "
                "(load_mae(..., probe=FILE)), or use features()."
            )
        if self.head_sizes == "linear":
            logits: Tensor = self.head(self.bn(latent[:, 0]))
            return logits
        if latent.shape[1] != 1 + self.patches:
            raise ValueError(
                f"The ViT-probing head takes all {1 + self.patches} tokens of an image, but got "
                f"{latent.shape[1]}. Classify whole images; a linear head takes masked ones."
            )
        x = self.classifier_embed(latent) + self.classifier_pos_embed
        x = self.classifier_norm(self.classifier_blocks(x))
        answer: Tensor = self.classifier_pred(x[:, 0])
        return answer

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Return the prediction ``[N, L, n]`` of every patch.

        Args:
            latent: the encoder's outputs ``[N, 1 + K, D]``.
            restore: of the masking ``[N, L]``.
        """
        self._require_decoder("reconstruction")
        seen = self.decoder_embed(latent)
        hidden = self.mask_token.expand(seen.shape[0], restore.shape[1] + 1 - seen.shape[1], -1)
        patches = _take(torch.cat([seen[:, 1:], hidden], dim=1), restore)
        x = torch.cat([seen[:, :1], patches], dim=1) + self.decoder_pos_embed
        prediction: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return prediction[:, 1:]

    def reconstruct(self, x: Tensor, order: Tensor, ratio: float = 0.75) -> Reconstruction:
        """Hide patches and predict them.

        Args:
            x: images ``[B, C, H, W]``; each is embedded once, however many masks it gets.
            order: patch indices ``[N, L]``, the visible ones first (see :func:`masking`); N is a
                multiple of B, and the rows of an image follow one another.
            ratio: share of patches that are hidden.

        Raises:
            ValueError: the ratio hides nothing or all, it is not known what the decoder predicts,
                there is no decoder, the images are of another size, or the orders do not fit them.
        """
        self._require_decoder("reconstruction")
        if self.normalised is None:
            raise ValueError(
                "It is not known whether this decoder predicts plain pixels or pixels normalised "
                "patch by patch. Set mae.normalised to False or True, as it was trained."
            )
        if order.dim() != 2 or order.shape[1] != self.patches or order.shape[0] % x.shape[0]:
            raise ValueError(
                f"Orders of patches are [N, {self.patches}] with N a multiple of the "
                f"{x.shape[0]} images, but the shape is {[*order.shape]}. Give as many rows to "
                "every image."
            )
        hidden = masking(order, require_both(self.patches, ratio))
        latent = self.encode(self.embed(x), hidden.keep)
        prediction = self.decode(latent, hidden.restore)
        target = targets(patchify(x, self.patch), self.normalised)
        if x.shape[0] > 1:
            target = target.repeat_interleave(order.shape[0] // x.shape[0], dim=0)
        loss = masked_loss(prediction, target, hidden.mask)
        return Reconstruction(loss, prediction, target, latent, hidden)

    def turns(self, x: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of the turn of images; the first four are in use.

        All tokens go through encoder and decoder; the decoder's class token answers.
        """
        self._require_decoder("rotation")
        tokens = self.decoder_embed(self.features(x)) + self.decoder_pos_embed
        logits: Tensor = self.rotation_head(self.decoder_norm(self.decoder_blocks(tokens))[:, 0])
        return logits

    def _require_decoder(self, task: str) -> None:
        if self.decoder is None or self.task != task:
            has = "no decoder" if self.decoder is None else f"a decoder for {self.task}"
            raise ValueError(
                f"This network has {has}, and {task} needs one of its own. Load a file with such a "
                "decoder ('..._full.pth' and the visualisation files have one for reconstruction)."
            )


class MAEClassifier(Encoder):
    """The classifier that MAE fine-tuning trains: images ``[N, C, H, W]`` to ``[N, classes]``.

    Its position table trains too.

    Args:
        image: height and width in pixels, or one number for both.
        patch: side of a patch in pixels.
        encoder: its size.
        pool: classify the ``"mean"`` of the patch tokens, normed afterwards, or the class
            ``"token"``, normed before.
        classes: number of logits.
        channels: of the images.

    Source: He et al., CVPR 2022, arXiv 2111.06377.
    """

    def __init__(
        self,
        image: int | tuple[int, int],
        patch: int,
        encoder: Sizes,
        pool: Literal["mean", "token"] = "mean",
        classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__(image, patch, encoder, channels)
        self.pool, self.classes = pool, classes
        if pool == "mean":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(encoder.dim, eps=EPS)
        self.head = nn.Linear(encoder.dim, classes)
        self._initialise()
        self.pos_embed.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        tokens = self.features(x)
        mean = self.pool == "mean"
        pooled = self.fc_norm(tokens[:, 1:].mean(dim=1)) if mean else tokens[:, 0]
        logits: Tensor = self.head(pooled)
        return logits


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return ``[N, K, D]``: of images ``[B, L, D]`` the tokens ``[N, K]``, N / B rows an image."""
    n, images, length = index.shape[0], *tokens.shape[:2]
    if images > 1:
        first = torch.arange(images, device=index.device).repeat_interleave(n // images) * length
        index = index + first.unsqueeze(1)
    # One gather of rows: on a CPU four times as fast, forward and back, as indexing or expanding.
    taken = tokens.flatten(0, 1).index_select(0, index.flatten())
    return taken.view(n, index.shape[1], tokens.shape[2])
