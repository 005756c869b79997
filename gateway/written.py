"""What the operator wrote, as it was last read: one place, so that a reload changes it for all.

Whoever needs an option asks for it when it is needed and does not keep it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cortex.gateway.catalogue import Catalogue, catalogue_for
from cortex.gateway.config import GatewayConfig, Timeouts, load_config


@dataclass
class Written:
    """Only ``reload.py`` puts something else in."""

    config: GatewayConfig
    catalogue: Catalogue

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """Return what the files and the environment say; blocks. Raise ConfigError.

        Without *path* the default file is read if it is there.
        """
        config, file = load_config(path)
        names = [neuron.name for neuron in config.neurons]
        return cls(config, catalogue_for(config.models_config, file, names))

    @property
    def timeouts(self) -> Timeouts:
        """``[timeouts]``."""
        return self.config.timeouts
