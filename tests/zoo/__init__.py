"""One tiny configuration for each kind of model that slimlmm knows; sizes differ from each other wherever they may."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tiny import NAMES, tiny_config
from zoo import aligned, later, others, texts

CONFIGS: dict[str, Callable[[], Any]] = {
    **{name: partial(tiny_config, name) for name in NAMES},
    **aligned.CONFIGS,
    **others.CONFIGS,
    **texts.CONFIGS,
    **later.CONFIGS,
}
