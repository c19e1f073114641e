"""Palettes: a short training brings the colours of three pictures together and keeps their sizes."""

from dataclasses import replace

import numpy as np

from benchmarks.gaussian_barycenter import QUICK, train
from benchmarks.palettes import Palettes, distance, recolour, strip


def test_palettes_come_together():
    generator = np.random.default_rng(0)
    pictures = [(generator.normal(centre, 15, (20, 30 + k, 3))).clip(0, 255).astype(np.uint8)
                for k, centre in enumerate([(180, 90, 90), (90, 180, 90), (90, 90, 180)])]
    maps, _ = train(Palettes(pictures), replace(QUICK, steps=100))
    recoloured = recolour(maps, pictures)
    assert [picture.shape for picture in recoloured] == [picture.shape for picture in pictures]
    assert distance(recoloured) < 0.3 * distance(pictures)
    assert strip(recoloured, 40).shape == (40, 60 + 62 + 64, 3)
