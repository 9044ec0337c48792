"""A saved merge opens with plain `transformers`: six architectures with random weights, merged from folders
by the command line."""
import json

import pytest
import torch

transformers = pytest.importorskip('transformers')
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def kinds():
    "Architecture -> (class of the network, configuration, class that opens it)."
    t = transformers
    return {
        'bert': (
            t.BertForSequenceClassification,
            t.BertConfig(vocab_size=64, **SMALL),
            t.AutoModelForSequenceClassification,
        ),
        'gpt2': (
            t.GPT2LMHeadModel,
            t.GPT2Config(
                vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
            ),
            t.AutoModelForCausalLM,
        ),
        'llama': (
            t.LlamaForCausalLM,
            t.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SMALL),
            t.AutoModelForCausalLM,
        ),
        'vit': (
            t.ViTForImageClassification,
            t.ViTConfig(image_size=16, patch_size=8, **SMALL),
            t.AutoModelForImageClassification,
        ),
        'resnet': (
            t.ResNetForImageClassification,
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic'),
            t.AutoModelForImageClassification,
        ),
        't5': (
            t.T5ForConditionalGeneration,
            t.T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
            ),
            t.AutoModelForSeq2SeqLM,
        ),
    }


def inputs(kind):
    g = torch.Generator().manual_seed(0)
    words, picture = torch.randint(0, 64, (2, 7), generator=g), torch.randn(2, 3, 16, 16, generator=g)
    if kind in ('vit', 'resnet'): return dict(pixel_values=picture)
    return dict(input_ids=words) | (dict(decoder_input_ids=words[:, :3]) if kind == 't5' else {})


def written(folder, kind, seed, dtype=torch.float32):
    "A model as `save_pretrained` leaves it, with a tokenizer or the settings of its pictures."
    cls, config, _ = kinds()[kind]
    torch.manual_seed(seed)
    model = cls(config).eval()
    for name, t in model.state_dict().items():
        if 'running' in name: t.copy_(torch.rand(t.shape) + .5)
    model.to(dtype).save_pretrained(folder)
    if kind in ('vit', 'resnet'):
        (folder / 'preprocessor_config.json').write_text(
            json.dumps({'image_processor_type': 'ViTImageProcessor', 'size': {'height': 16, 'width': 16}})
        )
    else:
        (folder/'vocab.json').write_text('{"a": 0, "b": 1}')
        (folder / 'tokenizer_config.json').write_text(
            '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code.X", null]}}'
        )
        (folder/'tokenizer.model').write_bytes(b'\xff\0binary')
    (folder/'modeling_x.py').write_text('raise SystemExit("code of a model folder was run")')
    return model


def mean(models):
    "The network of the mean weights, made without this package."
    own = [m.state_dict() for m in models]
    with torch.no_grad():
        return {
            k: torch.stack([s[k].float() for s in own]).mean(0).to(t.dtype) if t.is_floating_point() else t
            for k, t in own[0].items()
        }


@pytest.mark.parametrize('kind', ['bert', 'gpt2', 'llama', 'vit', 'resnet', 't5'])
def test_a_merge_opens_with_transformers(tmp_path, here, kind):
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = [written(tmp_path/n, kind, seed) for seed, n in enumerate('ab')]
    shards = ['shard_size=20000'] if kind == 'llama' else []
    done = here(
        'method=simple_average',
        'modelpool=folders',
        f'modelpool.models={{a: {tmp_path}/a, b: {tmp_path}/b}}',
        f'merged_model_save_path={tmp_path}/out',
        *shards,
    )
    assert done.status == 0, done.err
    assert not list((tmp_path / 'out').glob('*.py')) and 'auto_map' not in ''.join(
        f.read_text() for f in (tmp_path / 'out').glob('*.json')
    )
    for f in (tmp_path/'a').iterdir():
        if f.suffix not in ('.py', '.safetensors'): assert (tmp_path/'out'/f.name).exists(), f.name
    merged, info = kinds()[kind][2].from_pretrained(tmp_path/'out', output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    expected = models[0]
    expected.load_state_dict(mean(models))
    with torch.inference_mode():
        torch.testing.assert_close(merged.eval()(**inputs(kind)).logits, expected(**inputs(kind)).logits)


def test_its_configuration_names_the_type_that_was_written(tmp_path, here):
    for seed, n in enumerate('ab'): written(tmp_path/n, 'gpt2', seed)
    done = here(
        'method=simple_average',
        'modelpool=folders',
        f'modelpool.models={{a: {tmp_path}/a, b: {tmp_path}/b}}',
        f'merged_model_save_path={tmp_path}/out',
        'dtype=bfloat16',
    )
    assert done.status == 0, done.err
    assert json.loads((tmp_path/'out'/'config.json').read_text())['dtype'] == 'bfloat16'
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out').dtype == torch.bfloat16


def test_words_in_another_order_are_refused(tmp_path, here):
    for seed, n in enumerate('ab'): written(tmp_path/n, 'gpt2', seed)
    (tmp_path/'b'/'vocab.json').write_text('{"b": 0, "a": 1}')
    run = [
        'method=simple_average',
        'modelpool=folders',
        f'modelpool.models={{a: {tmp_path}/a, b: {tmp_path}/b}}',
        f'merged_model_save_path={tmp_path}/out',
    ]
    refused = here(*run)
    assert (
        refused.status == 2
        and '`b` to number words as the base does' in refused.line
        and 'check_vocabulary=false' in refused.line
    )
    assert here(*run, 'modelpool.check_vocabulary=false').status == 0


def test_networks_in_memory_are_saved_whole(tmp_path):
    from fusionbook.method import SimpleAverage
    from fusionbook.modelpool import BaseModelPool
    models = [written(tmp_path/n, 'gpt2', seed) for seed, n in enumerate('ab')]
    pool = BaseModelPool(models)
    pool.save_model(SimpleAverage().merge(pool), tmp_path/'out')
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out').eval()
    models[0].load_state_dict(mean(models))
    with torch.inference_mode():
        logits, first = (m(**inputs('gpt2')).logits for m in (merged, models[0]))
    torch.testing.assert_close(logits, first)


def test_a_tied_head_is_stored_once(tmp_path):
    from fusionbook.core.checkpoint import Checkpoint
    from fusionbook.method import SimpleAverage
    from fusionbook.modelpool import BaseModelPool
    models = [written(tmp_path/n, 'gpt2', seed) for seed, n in enumerate('ab')]
    for m, n in zip(models, 'ab', strict=True):
        torch.save(m.state_dict(), tmp_path/n/'pytorch_model.bin')
        (tmp_path/n/'model.safetensors').unlink()
    pool = BaseModelPool({n: str(tmp_path/n) for n in 'ab'})
    pool.save_model(SimpleAverage().merge(pool), tmp_path/'out')
    assert Checkpoint(tmp_path/'out').tied == {'lm_head.weight': 'transformer.wte.weight'}
    models[0].load_state_dict(mean(models))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out').eval()
    with torch.inference_mode():
        torch.testing.assert_close(merged(**inputs('gpt2')).logits, models[0](**inputs('gpt2')).logits)


def test_what_models_share_is_merged_and_the_rest_is_the_bases(tmp_path, here):
    """Two classifiers with two and with three classes: bodies are averaged, the saved model has the base's
    head and opens."""
    t = transformers
    models = {}
    for n, labels in (('_pretrained_', 2), ('a', 3)):
        torch.manual_seed(labels)
        models[n] = t.BertForSequenceClassification(
            t.BertConfig(vocab_size=64, num_labels=labels, **SMALL)
        ).eval()
        models[n].save_pretrained(tmp_path/n)
    run = [
        'method=task_arithmetic',
        'method.scaling_factor=.5',
        'modelpool=folders',
        f'modelpool.models={{_pretrained_: {tmp_path}/_pretrained_, a: {tmp_path}/a}}',
        f'merged_model_save_path={tmp_path}/out',
    ]
    refused = here(*run)
    assert (
        refused.status == 2
        and 'other shapes at `classifier.bias' in refused.line
        and 'modelpool.common_only=true' in refused.line
    )
    done = here(*run, 'modelpool.common_only=true') # as the refusal says
    assert done.status == 0, done.err
    merged = t.AutoModelForSequenceClassification.from_pretrained(tmp_path/'out').eval()
    base, other = models['_pretrained_'].state_dict(), models['a'].state_dict()
    expected = {
        k: v if k.startswith('classifier') or not v.is_floating_point() else (v + other[k]) / 2
        for k, v in base.items()
    }
    models['_pretrained_'].load_state_dict(expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            merged(**inputs('bert')).logits, models['_pretrained_'](**inputs('bert')).logits
        )


@pytest.mark.parametrize(
    'notes, says',
    [({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, 'a quantised model (awq)'), ({}, None)],
)
def test_a_quantised_folder_is_refused_by_its_configuration(tmp_path, here, notes, says):
    for seed, n in enumerate('ab'): written(tmp_path/n, 'llama', seed)
    config = json.loads((tmp_path/'b'/'config.json').read_text())
    (tmp_path/'b'/'config.json').write_text(json.dumps(config | notes))
    done = here(
        'method=simple_average',
        'modelpool=folders',
        f'modelpool.models={{a: {tmp_path}/a, b: {tmp_path}/b}}',
        f'merged_model_save_path={tmp_path}/out',
    )
    assert (
        (done.status == 0)
        if says is None
        else (done.status == 2 and says in done.line and 'weights in `b`' in done.line)
    )


def test_an_adapter_folder_is_refused_with_the_way_out(tmp_path, here):
    from safetensors.torch import save_file
    written(tmp_path/'a', 'llama', 0)
    (tmp_path/'b').mkdir()
    (tmp_path / 'b' / 'adapter_config.json').write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'
    )
    save_file(
        {'base_model.model.q.lora_A.weight': torch.ones(1, 2)}, tmp_path / 'b' / 'adapter_model.safetensors'
    )
    for more in ([], ['modelpool.common_only=true']):
        done = here(
            'method=simple_average',
            'modelpool=folders',
            f'modelpool.models={{a: {tmp_path}/a, b: {tmp_path}/b}}',
            *more,
        )
        assert done.status == 2 and 'merge_and_unload' in done.line and 'common' not in done.line
