"""Collapse lights on features whose rank and spread are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from meristem.platform.contrastive.lights import feature_lights


def test_orthogonal_features_have_full_rank() -> None:
    lights = feature_lights(torch.linalg.qr(torch.randn(64, 16)).Q)
    assert lights["rank"] == pytest.approx(16, rel=1e-4) and lights["dims"] == 16


def test_isotropic_features_have_spread_one_and_nearly_full_rank() -> None:
    lights = feature_lights(torch.randn(20000, 16))
    assert lights["rank"] == pytest.approx(16, rel=0.01) and lights["std"] == pytest.approx(1, rel=0.02)


def test_collapse_shows() -> None:
    lights = feature_lights(torch.randn(1, 16).expand(64, 16))
    assert lights["rank"] == pytest.approx(1, rel=1e-3) and lights["std"] == pytest.approx(0, abs=1e-5)
    line = torch.randn(64, 1) @ torch.randn(1, 16)  # a line through zero: rank one, but spread
    assert feature_lights(line)["rank"] == pytest.approx(1, rel=1e-3) and feature_lights(line)["std"] > 0.5
    assert feature_lights(torch.zeros(8, 4))["rank"] == pytest.approx(1)


def test_the_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    sigma = np.array([4.0, 2.0, 1.0, 1.0])
    u, v = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (32, 8))
    p = sigma / sigma.sum()
    lights = feature_lights(u @ torch.diag(torch.tensor(sigma, dtype=torch.float32)) @ v.T)
    assert lights["rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_scale_does_not_matter_and_what_is_not_finite_does_not_raise() -> None:
    z = torch.randn(32, 8)
    assert feature_lights(z * 100)["rank"] == pytest.approx(feature_lights(z)["rank"], rel=1e-4)
    z[3, 3] = math.inf
    assert math.isnan(feature_lights(z)["rank"]) and feature_lights(z)["dims"] == 8
