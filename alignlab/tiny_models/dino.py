"""Stage `dino`: a tiny `Dinov2Model` whose patch tokens tell the subjects of `shapes` apart.

Unlike the real DINOv2 it is supervised: attributes per patch, and a contrastive loss that pulls a
subject in a clip to the same subject in its reference pose. That makes minutes of CPU time enough
for what objectives need from a teacher: patch features that name the subject, whatever its pose.
Shape letters: B images, P patches, D width, K subjects, H height, W width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from alignlab.data.sample import Sample
from alignlab.data.shapes.world import ACCENTS, COLORS, SHAPES, TEXTURES, all_subjects
from alignlab.randomness import generator
from alignlab.tiny_models.clips import ClipPool
from alignlab.tiny_models.stage import train_stage

IMAGE_SIZE = 64
PATCH = 16
TEMPERATURE = 0.1
CLIPS_PER_STEP = 24
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
VOCABULARIES = (SHAPES, tuple(COLORS), TEXTURES, tuple(ACCENTS))
ATTRIBUTES = {s.name: (s.shape, s.color, s.texture, s.accent) for s in all_subjects()}


class DinoWithHeads(nn.Module):
    """The backbone and the attribute heads that only its training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(
            Dinov2Config(
                hidden_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                mlp_ratio=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH,
                layerscale_value=1.0,
            )
        )
        self.heads = nn.ModuleList(nn.Linear(96, len(v)) for v in VOCABULARIES)

    def patches(self, images_BHWC: Tensor) -> Tensor:
        """uint8 images to final-normed patch tokens `(B, P, D)`."""
        tokens: Tensor = self.backbone(normalise(images_BHWC)).last_hidden_state
        return tokens[:, 1:]


def normalise(images_BHWC: Tensor) -> Tensor:
    """uint8 to ImageNet-normalised float `(B, C, H, W)`."""
    x = images_BHWC.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def coverage(mask_HW: Tensor) -> Tensor:
    """Share of each patch that a mask covers, `(P,)`."""
    return F.avg_pool2d(mask_HW[None, None].float(), PATCH).flatten()


def pool(tokens_PD: Tensor, weight_P: Tensor) -> Tensor:
    """Weighted mean token, normalised."""
    return F.normalize((tokens_PD * weight_P[:, None]).sum(0), dim=-1)


def train_dino(clips: ClipPool, *, steps: int, work: Path) -> Dinov2Model:
    """Trains the teacher; attribute cross-entropy per patch plus subject InfoNCE."""
    torch.manual_seed(1)
    model = DinoWithHeads()

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = generator(0, "dino", step)
        samples = clips.draw(rng, CLIPS_PER_STEP)
        frames = torch.randint(len(samples[0].video_THWC), (len(samples),), generator=rng).tolist()
        return _losses(model, samples, frames)

    train_stage("dino", model, loss_at, steps=steps, work=work)
    return model.backbone.eval().requires_grad_(False)


def _losses(model: DinoWithHeads, samples: list[Sample], frames: list[int]) -> dict[str, Tensor]:
    references = [(i, k) for i, s in enumerate(samples) for k in range(len(s.references))]
    images = [s.video_THWC[t] for s, t in zip(samples, frames, strict=True)]
    images += [samples[i].references[k].image_HWC for i, k in references]
    tokens_BPD = model.patches(torch.stack(images))
    seen, shown, labels, patches = [], [], [], []
    for number, (i, k) in enumerate(references):
        masks = samples[i].masks_ETHW
        assert masks is not None  # shapes always has masks
        in_clip = coverage(masks[k, frames[i]])
        in_reference = coverage(samples[i].references[k].mask_HW)
        name = samples[i].references[k].name
        for weight_P, tokens_PD in (
            (in_clip, tokens_BPD[i]),
            (in_reference, tokens_BPD[len(samples) + number]),
        ):
            on_subject_ND = tokens_PD[weight_P > 0.4]
            patches.append(on_subject_ND)
            labels += [name] * len(on_subject_ND)
        if in_clip.sum() > 1.0:  # pooled features of a hardly visible subject say nothing
            seen.append(pool(tokens_BPD[i], in_clip))
            shown.append(pool(tokens_BPD[len(samples) + number], in_reference))
    logits = torch.stack(seen) @ torch.stack(shown).T / TEMPERATURE
    target = torch.arange(len(logits))
    contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return {"contrast": contrast / 2, "attributes": _attribute_loss(model, patches, labels)}


def _attribute_loss(model: DinoWithHeads, patches: list[Tensor], labels: list[str]) -> Tensor:
    tokens_ND = torch.cat(patches)
    loss = tokens_ND.new_zeros(())
    for position, (head, vocabulary) in enumerate(zip(model.heads, VOCABULARIES, strict=True)):
        target = torch.tensor([vocabulary.index(ATTRIBUTES[n][position]) for n in labels])
        loss = loss + F.cross_entropy(head(tokens_ND), target)
    return loss / len(VOCABULARIES)
