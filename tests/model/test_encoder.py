import pytest
import torch
from models import prefix_config, random_bloom
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from peft import PrefixEncoder as PeftEncoder
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_prefix, save_adapter
from prefix_tuning.model.bloom import empty_prefix
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder, flatten, unflatten

BLOOM_1B4_ZH = PrefixConfig(10, 24, 16, 2048, 2048, prefix_projection=True)


def peft_encoder(config: PrefixConfig) -> PeftEncoder:
    return PeftEncoder(
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            token_dim=config.token_dim,
            encoder_hidden_size=config.encoder_hidden_size,
            prefix_projection=config.prefix_projection,
            num_transformer_submodules=1,
        )
    )


def test_the_shape_follows_the_base():
    base = random_bloom().config
    assert PrefixConfig.of(base, 10) == PrefixConfig(10, 3, 6, 48, 48, prefix_projection=True)
    assert PrefixConfig.of(base, 7, 20, False) == PrefixConfig(7, 3, 6, 48, 20, prefix_projection=False)
    assert empty_prefix(base).shape == PrefixEncoder(PrefixConfig.of(base, 1)).bake()[:, :, :, :0].shape == (3, 2, 6, 0, 8)


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "mistral": {"head_dim": 20},
    "gemma": {"head_dim": 12},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_for_grouped_heads_equals_pefts(family, tmp_path):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=99, intermediate_size=16, **shape, **FAMILIES[family])
    torch.manual_seed(0)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True),
    )
    theirs.save_pretrained(tmp_path)
    ours = PrefixEncoder(PrefixConfig.of(config, 3))
    ours.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    assert ours.bake().shape == (2, 2, 2, 3, FAMILIES[family].get("head_dim", 8))
    assert torch.equal(load_prefix(tmp_path).tensor, ours.bake())

    save_adapter(tmp_path, ours.bake() + 1, ours.config, {"name_or_path": family})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path)
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, flatten(ours.bake() + 1))


def test_bloom_1b4_zh_has_205_641_728_parameters():
    with torch.device("meta"):
        encoder = PrefixEncoder(BLOOM_1B4_ZH)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 205_641_728
    assert encoder().shape == (24, 2, 16, 10, 128)
    assert encoder().numel() == 983_040


@pytest.mark.parametrize("projection", [True, False])
def test_keys_shapes_and_numbers_equal_pefts(projection):
    config = PrefixConfig(7, 3, 6, 48, 20, projection)
    ours, theirs = PrefixEncoder(config), peft_encoder(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    flat = theirs(torch.arange(7).unsqueeze(0))
    # PEFT's own way from the flat tensor to past_key_values: (layers * 2, batch, heads, tokens, head_dim).
    expected = flat.view(1, 7, 3 * 2, 6, 8).permute(2, 0, 3, 1, 4).reshape(3, 2, 6, 7, 8)
    assert torch.equal(ours(), expected)
    assert torch.equal(flatten(ours()), flat[0])


def test_random_start_is_distributed_as_pefts():
    torch.manual_seed(0)
    ours = PrefixEncoder(PrefixConfig(50, 3, 6, 48, 96, True))
    torch.manual_seed(0)
    theirs = peft_encoder(ours.config)
    ours.initialize("random")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("projection", [True, False])
def test_zero_and_text_start(projection):
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model, projection=projection))
    encoder.initialize("zero")
    assert not encoder.bake().any()

    text = torch.randn(3, 2, 6, 5, 8)
    encoder.initialize("text", text)
    assert torch.equal(encoder.bake(), text)
    # The text's pairs are a constant beside the weights with the projection, and the weights themselves without.
    assert ("text_prefix" in encoder.state_dict()) == projection
    encoder().sum().backward()
    trained = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert "text_prefix" not in trained and trained


def test_flatten_undoes_unflatten():
    flat = torch.randn(5, 3 * 2 * 48)
    assert torch.equal(flatten(unflatten(flat, 3, 6)), flat)


def test_bake_needs_no_gradient():
    assert not PrefixEncoder(prefix_config(random_bloom())).bake().requires_grad


@pytest.mark.parametrize("field", ["num_virtual_tokens", "num_layers", "token_dim", "encoder_hidden_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5", None])
def test_shapes_that_make_no_sense_are_refused(field, value):
    values = vars(BLOOM_1B4_ZH) | {field: value}
    with pytest.raises(UserError, match=field):
        PrefixConfig(**values)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(UserError, match="does not divide"):
        PrefixConfig(10, 2, 5, 48, 48, True)


@pytest.mark.parametrize("name, text", [("text", False), ("zero", True), ("random", True), ("ones", False)])
def test_a_start_that_does_not_fit_its_text_is_refused(name, text):
    encoder = PrefixEncoder(prefix_config(random_bloom()))
    before = encoder.bake()
    with pytest.raises(ValueError, match="prefix_init is random, zero, or text with a text_prefix; not"):
        encoder.initialize(name, torch.zeros_like(before) if text else None)
    assert torch.equal(encoder.bake(), before)
