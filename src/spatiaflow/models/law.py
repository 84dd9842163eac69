"""The joint law of expression: a mean, an effect of each slide, a Gaussian field over space, and counts.

    log rate = log mean + slide effect + field + nugget
    count ~ NB(library x rate, theta)

Slide effect, field and nugget have one correlation between genes, of low rank plus a part of each gene's own. The field is a sum
of exponential kernels. Everything is fitted to held-out predictions of training slides (:mod:`spatiaflow.train.law`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from spatiaflow.models.counts import log_variance, theta_of
from spatiaflow.models.fields import Fields
from spatiaflow.models.regression import blocks

DONOR_SD = 1.0  # of log rate between donors, where fewer than MIN_DONORS were seen
MIN_DONORS = 4
DONOR_DF = 5.0  # of the t distribution of donor effects
SHARED = 0.3  # share of the donor effect that all genes have in common
FIELD_SCALE = {False: 0.1, True: 0.35}  # sd of the log of the factor on the field's sd; True: a new donor
MAX_EFFECT = 4.0  # sds


@dataclass(frozen=True)
class JointLaw:
    """Law of the deviations from a predicted mean; see the module.

    Attributes
    ----------
    theta
        Inverse dispersion of the counts of each gene, given field and nugget.
    lengths
        Ranges of the field's kernels, µm.
    field_sd
        Standard deviation of each part of the field in log rate, ranges x genes.
    nugget_sd
        Of what differs between neighbouring spots, genes.
    slide_sd
        Of the effect of a slide whose donor is in the training data, genes.
    donor_sd
        Of the effect of a slide of a new donor, genes.
    factors
        Gene correlation: factors @ factors.T + diagonal, genes x factors.
    donors_learned
        Whether ``donor_sd`` was learned from donors; otherwise it is a stated prior.
    """

    theta: np.ndarray
    lengths: np.ndarray
    field_sd: np.ndarray
    nugget_sd: np.ndarray
    slide_sd: np.ndarray
    donor_sd: np.ndarray
    factors: np.ndarray
    donors_learned: bool = False

    @property
    def own(self) -> np.ndarray:
        """Share of each gene's variance that no other gene has, genes."""
        return np.maximum(1 - (self.factors**2).sum(1), 0)

    @property
    def variance(self) -> np.ndarray:
        """Variance of log rate around the slide's level, genes."""
        return (self.field_sd**2).sum(0) + self.nugget_sd**2

    def marginal_theta(self, new_donor: bool | None = None) -> np.ndarray:
        """Inverse dispersion of a single count, with everything else integrated out; None: given the slide effect."""
        variance = self.variance
        if new_donor is not None:
            variance = variance + (self.donor_sd if new_donor else self.slide_sd) ** 2
        return theta_of(log_variance(self.theta) + variance)

    def correlated(self, common: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Give independent normals the correlation between genes: ... x factors and ... x genes to ... x genes."""
        return common @ self.factors.T.astype(np.float32) + own * np.sqrt(self.own).astype(np.float32)

    def slide_effects(self, name: str, n_draws: int, new_donor: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Effects of a slide on log rate (draws x genes) and factors on its field's standard deviation (draws).

        Draws come in pairs of opposite sign and have unit variance, so that their mean is exact and their spread is not left
        to chance: all spots of a slide share them.
        """
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 2**31])
        half = -(-n_draws // 2)

        def paired(*shape: int) -> np.ndarray:
            z = rng.standard_normal((half, *shape))
            z = np.stack([z, -z], 1).reshape(2 * half, *shape)[:n_draws]
            return z / np.sqrt(np.maximum((z**2).mean(0), 1e-12)) if n_draws > 3 else z

        n_genes, n_factors = self.factors.shape
        effect = self.correlated(paired(n_factors), paired(n_genes))
        sd = self.slide_sd
        common = paired(1)
        if new_donor:
            heavy = np.sqrt((DONOR_DF - 2) / rng.chisquare(DONOR_DF, half)).repeat(2)[:n_draws, None]
            effect = (np.sqrt(1 - SHARED) * effect + np.sqrt(SHARED) * common) * heavy
            sd = self.donor_sd
        scale = np.exp(FIELD_SCALE[new_donor] * paired())
        return sd * np.clip(effect, -MAX_EFFECT, MAX_EFFECT), scale

    def draws(
        self, name: str, xy: np.ndarray, log_mean: np.ndarray, library: np.ndarray, n_draws: int, *, new_donor: bool, seed: int,
        move: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yield joint draws of the counts of one slide, n x genes, one at a time.

        Parameters
        ----------
        name
            Of the slide; noise belongs to it and the seed.
        xy
            Positions, n x 2, µm.
        log_mean
            Logarithm of the mean rate, n x genes.
        library
            Counts of each spot that a draw is to have, n.
        new_donor
            Whether the slide's donor is not in the training data.
        move
            Changes field and nugget, n x genes, of a draw; see :class:`spatiaflow.models.field_flow.Moves`.
        """
        n = len(log_mean)
        effects, scales = self.slide_effects(name, n_draws, new_donor, seed)
        parts = [Fields(xy, float(length)) for length in self.lengths]
        size = np.asarray(library, np.float32)[:, None]
        for i in range(n_draws):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), i])
            scale = np.float32(scales[i])
            log_rate = self.deviation(parts, rng, n, scale)
            if move is not None:
                log_rate = move(i, log_rate)
            variance = scale**2 * (self.field_sd**2).sum(0) + self.nugget_sd**2
            log_rate += (effects[i] - variance / 2).astype(np.float32)  # so that the mean is the mean
            log_rate += log_mean
            for rows in blocks(n):
                rate = size[rows] * np.exp(np.minimum(log_rate[rows], 0)) / self.theta
                log_rate[rows] = rng.poisson(rate * rng.standard_gamma(np.broadcast_to(self.theta, rate.shape)))
            yield log_rate

    def deviation(
        self, parts: list[Fields], rng: np.random.Generator, n: int, scale: float | np.floating = 1.0
    ) -> np.ndarray:
        """A draw of nugget and field (a part for each range, its standard deviation times ``scale``), n x genes."""
        n_normals = sum(self.factors.shape)
        out = np.zeros((n, self.factors.shape[0]), np.float32)
        self._add(out, rng.standard_normal((n, n_normals), dtype=np.float32), self.nugget_sd)
        for part, sd in zip(parts, self.field_sd):
            self._add(out, part.draw(rng, n_normals), scale * sd)
        return out

    def _add(self, out: np.ndarray, independent: np.ndarray, sd: np.ndarray) -> None:
        """Add correlated normals, n x genes, made from n x (factors + genes) independent ones, times ``sd``."""
        n_factors = self.factors.shape[1]
        for rows in blocks(len(out)):
            z = independent[rows]
            out[rows] += self.correlated(z[:, :n_factors], z[:, n_factors:]) * sd.astype(np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, by name."""
        return {field.name: np.asarray(getattr(self, field.name), np.float64) for field in fields(self)}

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> JointLaw:
        """From what :meth:`tensors` gave."""
        known = dict(tensors)
        return cls(donors_learned=bool(known.pop("donors_learned")), **known)
