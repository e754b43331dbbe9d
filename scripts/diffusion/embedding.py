"""What a network is told besides the time: numbers such as age, and words such as sex or class, as one embedding.

MONAI's U-Net adds `class_embedding(class_labels)` to its embedding of the time. A network with one word has MONAI's own
`nn.Embedding` there; one with numbers or several words has a `CovariateEmbedding`, whose parts are added up. What a
list of covariates is, and a condition, says `scripts.running.covariates`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from scripts.running.covariates import one_word, unknown_of

PLACE = "class_embedding."
TIME_BIAS = "time_embed.2.bias"  # of the layer whose output the embedding is added to


class NumberEmbedding(nn.Module):
    """A standardised number as a vector: a network with one hidden layer, or, for NaN, a vector of its own.

    It begins as large as the vectors of words, of a standard deviation of 1 (PyTorch's layers would begin at a tenth of
    that): else numbers are learned much later than words.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, size), nn.Linear(size, size)
        nn.init.normal_(self.first.weight)
        nn.init.uniform_(self.first.bias, -2, 2)  # the bends of the hidden layer lie where the numbers do
        nn.init.normal_(self.second.weight, std=size**-0.5)
        self.unknown = nn.Parameter(torch.zeros(size))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, size)."""
        missing = torch.isnan(value)[:, None]
        known = self.first(torch.where(missing, torch.zeros_like(value[:, None]), value[:, None]))
        return torch.where(missing, self.unknown, self.second(nn.functional.silu(known)))


class WordEmbedding(nn.Embedding):
    """The index of a word as a vector; the index after the last, or anything that is none, is "unknown"."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, size)."""
        last = self.num_embeddings - 1
        known = (value >= 0) & (value < last)  # not so for NaN
        return super().forward(torch.where(known, value, torch.full_like(value, last)).long())


class CovariateEmbedding(nn.Module):
    """The sum of the embeddings of several covariates: (B, covariates) float32, NaN for unknown -> (B, size)."""

    def __init__(self, covariates: Sequence[Mapping[str, Any]], size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            WordEmbedding(len(c["words"]) + 1, size) if "words" in c else NumberEmbedding(size) for c in covariates
        )

    def forward(self, conditions: torch.Tensor) -> torch.Tensor:
        vector = self.parts[0](conditions[:, 0])
        for i, part in enumerate(self.parts):
            if i:
                vector = vector + part(conditions[:, i])
        return vector


def with_covariates(unet: DiffusionModelUNet, covariates: Sequence[Mapping[str, Any]]) -> DiffusionModelUNet:
    """The U-Net, made with `num_class_embeds(covariates)`, which is then told these covariates as `class_labels`."""
    if covariates and not one_word(covariates):
        unet.class_embedding = CovariateEmbedding(covariates, unet.class_embedding.embedding_dim)
    unet.covariates, unet.unknown = list(covariates), unknown_of(covariates)
    return unet


def places(covariates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the tensors of each covariate's embedding begin with in a state dict."""
    return {c["name"]: PLACE if one_word(covariates) else f"{PLACE}parts.{i}." for i, c in enumerate(covariates)}


def without_unknown(
    state_dict: Mapping[str, torch.Tensor], covariates: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The same network, in which "unknown" adds nothing: its vectors are zero, and what they were stands in the bias of
    the time's embedding.

    So the weights without those of `class_embedding` are those of the network that is told nothing.

    Args:
        state_dict: of a network with these covariates.
    """
    weights = copy.copy(state_dict)
    for covariate, place in zip(covariates, places(covariates).values(), strict=True):
        word = "words" in covariate
        unknown = weights[place + "weight"][-1:] if word else weights[place + "unknown"]
        name = place + ("weight" if word else "second.bias")
        weights[TIME_BIAS] = weights[TIME_BIAS] + unknown.flatten()
        weights[name] = weights[name] - unknown
        if not word:
            weights[place + "unknown"] = torch.zeros_like(unknown)
    return weights


def with_new_covariates(
    state_dict: Mapping[str, torch.Tensor],
    old: Sequence[Mapping[str, Any]],
    new: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Weights of a network with some covariates as those of one with others, which begins by saying exactly the same.

    What is new adds nothing at first: a number's second layer, a word's vectors, and the vectors of "unknown" are
    zero. A new word of an old covariate begins as "unknown", and what the new network does not know counts as unknown.

    Args:
        state_dict: of the old network.
        old, new: their covariates.
        wanted: state dict of the new network, for names, shapes and the random first layers.
    """
    state_dict = without_unknown(state_dict, old)
    weights = {name: tensor for name, tensor in state_dict.items() if not name.startswith(PLACE)}
    before, old_places = {c["name"]: c for c in old}, places(old)
    for covariate, place in zip(new, places(new).values(), strict=True):
        own = {name: tensor for name, tensor in wanted.items() if name.startswith(place)}
        then = before.get(covariate["name"])
        for name, tensor in own.items():
            part = name.removeprefix(place)
            if then is None:
                weights[name] = tensor.clone() if part.startswith("first.") else torch.zeros_like(tensor)
            elif "words" in covariate:
                table = state_dict[old_places[covariate["name"]] + part]
                rows = [then["words"].index(w) if w in then["words"] else -1 for w in covariate["words"]]
                weights[name] = table[[*rows, -1]].to(tensor.dtype)
            else:
                weights[name] = state_dict[old_places[covariate["name"]] + part]
    return weights
