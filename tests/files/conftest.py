import pytest
import torch
from models import prefix_config, random_bloom
from runs import RECORDED_BASE

from prefix_tuning.files.prefixes import save_adapter, save_encoder
from prefix_tuning.model.encoder import PrefixEncoder


@pytest.fixture(params=["projection", "no projection", "projection and text"])
def saved(request, tmp_path):
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model, projection=request.param != "no projection", width=20))
    if "text" in request.param:
        encoder.initialize("text", torch.randn(3, 2, 6, 5, 8))
    save_encoder(tmp_path, encoder, RECORDED_BASE)
    save_adapter(tmp_path, encoder.bake(), encoder.config, RECORDED_BASE)
    return tmp_path, encoder
