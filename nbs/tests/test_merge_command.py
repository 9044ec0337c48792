"""`fusionbook merge` as a user has it: architectures that transformers opens, mergekit's own examples, kills,
changed sources, and every bad input."""
import json, os, shutil, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusionbook
import warm
from fusionbook.core.errors import FusionError
from fusionbook.core.resumable import unfinished_room
from networks import NETS


def made(kind, folder, count=3):
    "A base and experts of one kind, saved; their networks."
    networks = []
    for i in range(count):
        torch.manual_seed(i)
        make, inputs = NETS[kind]
        networks.append(network := make().eval())
        network.save_pretrained(folder/f'm{i}')
    return networks, inputs, [str(folder/f'm{i}') for i in range(count)]


def answers(network, inputs):
    with torch.no_grad(): out = network(**inputs)
    return out.logits if hasattr(out, 'logits') else out.logits_per_image


KINDS = 'llama', 'llama_tied', 'mistral', 'qwen2', 'qwen3', 'gpt2', 'bert', 't5', 'vit', 'clip', 'mixtral'

def test_tensors_that_one_file_ties_and_another_does_not(tmp_path):
    """A file of ours keeps one tensor for two names: each is read; where the reference has one tensor and
    another file two different ones, one would be lost."""
    from fusionbook.core.checkpoint import Checkpoint, save
    one = torch.arange(6.).view(3, 2)
    save({'embed': one, 'head': one}, tmp_path/'tied')
    save({'embed': one + 1, 'head': one - 3}, tmp_path/'apart')
    save({'embed': one + 1, 'head': one.clone() + 1}, tmp_path/'twice')
    def merged(*names):
        return Checkpoint(
            fusionbook.merge(
                method='simple_average',
                models=[str(tmp_path / n) for n in names],
                out=tmp_path / '_'.join(names),
            )
        )
    found = merged('apart', 'tied')
    assert torch.equal(found['embed'], one + .5) and torch.equal(found['head'], one - 1.5)
    found = merged('tied', 'twice')
    assert torch.equal(found['embed'], one + .5) and torch.equal(found['head'], one + .5)
    with pytest.raises(
        FusionError,
        match='expected `head` of `.*apart` to be its `embed`, as in `.*tied`, got a head of its own',
    ):
        merged('tied', 'apart')


def kept(sd, path, **config):
    "A file of ours, which notes ties, with a configuration where one is given."
    from fusionbook.core.checkpoint import save
    save(sd, path)
    if config: (path/'config.json').write_text(json.dumps(config))
    return str(path)

def test_ties_of_a_stage(tmp_path):
    """A stage has the second names of what it is made of: they are written where it is the reference, and
    looked at where it is not."""
    from fusionbook.core.checkpoint import Checkpoint
    one = torch.arange(6.).view(3, 2)
    tied, twice = (
        kept({'embed': one, 'head': one}, tmp_path / 'tied'),
        kept({'embed': one + 1, 'head': one + 1.0}, tmp_path / 'twice'),
    )
    apart = kept({'embed': one + 1, 'head': one - 3}, tmp_path/'apart')
    def merged(name, stage, *models):
        text = [
            'name: stage',
            'method: simple_average',
            f'models: [{", ".join(stage)}]',
            '---',
            'method: simple_average',
            f'models: [{", ".join(models)}]',
        ]
        (tmp_path/f'{name}.yml').write_text('\n'.join(text))
        return Checkpoint(fusionbook.merge(tmp_path/f'{name}.yml', tmp_path/name))
    found = merged('first', [tied, twice], 'stage', twice)
    assert (
        {*found} == {'embed', 'head'}
        and torch.equal(found['head'], one + 0.75)
        and torch.equal(found['embed'], one + 0.75)
    )
    assert {*merged('second', [tied, twice], apart, 'stage')} == {'embed', 'head'}
    for name, stage, models in (('stage', [tied], ['stage', apart]), ('other', [apart], [tied, 'stage'])):
        with pytest.raises(
            FusionError,
            match='expected `head` of `.*(apart|stage)` to be its `embed`, as in `.*(tied|stage)`',
        ):
            merged(name, stage, *models)

def test_ties_behind_a_prefix(tmp_path):
    """A model whose names have a prefix: its head is looked at where the reference ties its own, and merged
    where it does not."""
    from fusionbook.core.checkpoint import Checkpoint
    one = torch.arange(6.).view(3, 2)
    tied, apart = (
        kept({'a': one, 'b': one}, tmp_path / 'tied'),
        kept({'model.a': one + 1, 'model.b': one - 3}, tmp_path / 'apart'),
    )
    with pytest.raises(
        FusionError, match='expected `model.b` of `.*apart` to be its `model.a`, as in `.*tied`'
    ):
        fusionbook.merge(method='simple_average', models=[tied, apart], out=tmp_path/'never')
    names = 'embed.weight', 'head.weight'
    own = [
        kept({f'{p}{n}': one + i for i, n in enumerate(names)}, tmp_path / f'own{p}') for p in ('', 'model.')
    ]
    found = Checkpoint(fusionbook.merge(method='simple_average', models=own, out=tmp_path/'out'))
    assert {*found} == {*names} and all(torch.equal(found[n], one + i) for i, n in enumerate(names))

@pytest.mark.parametrize('key', ['slices', 'modules'])
def test_ties_of_layers(key, tmp_path):
    """A head that a file ties is written with layers put together; a head of its own in the last block is
    refused, in the middle it is of no account; layers are no second names."""
    from fusionbook.core.checkpoint import Checkpoint
    one = torch.arange(6.).view(3, 2)
    def net(name, i, head, layer=None):
        sd = {
            'embed.weight': one + i,
            'h.0.w': torch.ones(2) * i,
            'h.1.w': torch.ones(2) * i + 1,
            'head.weight': head,
        }
        if head is None: sd['head.weight'] = sd['embed.weight']
        if layer: sd['h.1.w'] = sd['h.0.w']
        return kept(sd, tmp_path/name, model_type='tiny', num_hidden_layers=2)

    a, tied, apart, like = (
        net('a', 1, None),
        net('tied', 2, None),
        net('apart', 3, one),
        net('like', 4, None, True),
    )
    def merged(name, *models):
        slices = [{'sources': [{'model': m, 'layer_range': [0, 2]}]} for m in models]
        keys = {'slices': slices} if key == 'slices' else {'modules': {'text': {'slices': slices}}}
        return Checkpoint(fusionbook.merge(merge_method='passthrough', **keys, out=tmp_path/name))
    for i, models in enumerate(([a, tied], [a, apart, tied])):
        found = merged(f'out{i}', *models)
        assert (
            len(found) == 2 + 2 * len(models)
            and torch.equal(found['head.weight'], one + 1)
            and torch.equal(found['embed.weight'], one + 1)
        )
    with pytest.raises(
        FusionError, match='expected `head.weight` of `.*apart` to be its `embed.weight`, as in `.*a`'
    ):
        merged('never', a, apart)
    found = merged('layers', like, a)
    assert sorted(n for n in found if n[0] == 'h' and n != 'head.weight') == [
        f'h.{i}.w' for i in range(4)
    ] and torch.equal(found['h.1.w'], torch.ones(2) * 4)


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_opens_the_result(kind, tmp_path):
    """Task arithmetic of two experts: the network that transformers opens answers as one whose parameters
    were computed by hand."""
    networks, inputs, (base, a, b) = made(kind, tmp_path)
    models = [{'model': m, 'parameters': {'weight': w}} for m, w in ((a, .5), (b, .25))]
    out = fusionbook.merge(merge_method='task_arithmetic', base_model=base, models=models, out=tmp_path/'out')
    merged = type(networks[0]).from_pretrained(out).eval()
    with torch.no_grad():
        for p, x, y in zip(*(n.parameters() for n in networks), strict=True): p += .5*(x - p) + .25*(y - p)
    assert torch.allclose(answers(merged, inputs), answers(networks[0], inputs), atol=1e-5)


def test_layers_of_two_models(tmp_path):
    """Layers 0 and 1 of one model below layer 1 of another: transformers opens three layers, in bfloat16, in
    shards."""
    networks, inputs, (base, a, b) = made('llama', tmp_path)
    slices = [
        {'sources': [{'model': a, 'layer_range': [0, 2]}]},
        {'sources': [{'model': b, 'layer_range': [1, 2]}]},
    ]
    out = fusionbook.merge(
        merge_method='passthrough', slices=slices, dtype='bfloat16', out=tmp_path / 'out', shard_size='10kB'
    )
    merged = type(networks[0]).from_pretrained(out)
    assert (
        merged.config.num_hidden_layers == 3
        and merged.dtype == torch.bfloat16
        and len(list(out.glob('*.safetensors'))) > 1
    )
    assert torch.equal(
        merged.model.layers[2].mlp.up_proj.weight, networks[2].model.layers[1].mlp.up_proj.weight.bfloat16()
    )
    assert torch.equal(merged.lm_head.weight, networks[2].lm_head.weight.bfloat16()) and torch.equal(
        merged.model.embed_tokens.weight, networks[1].model.embed_tokens.weight.bfloat16()
    )


# mergekit's example files, with names of the hub that stand for tiny models
EXAMPLES = {
    'gradient-slerp': '{slices: [{sources: [{model: o/a, layer_range: [0, 40]}, {model: o/b, layer_range: [0, 40]}]}], merge_method: slerp, base_model: o/a,'
    ' parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]}, dtype: float16}',
    'bio': '{models: [{model: o/a, parameters: {density: 0.5, weight: 0.5}}, {model: o/b, parameters: {density: 0.5, weight: 0.5}}], merge_method: ties, base_model: o/base,'
    ' parameters: {normalize: false, int8_mask: true}, dtype: float16}',
    'ties': '{models: [{model: o/a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}, {model: o/b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}},'
    ' {model: o/c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}], merge_method: ties, base_model: o/base, parameters: {normalize: true, int8_mask: true}, dtype: float16}',
    'arcee': (
        '{models: [{model: o/a}, {model: o/b}], merge_method: arcee_fusion, base_model: o/a, dtype: '
        'bfloat16}'
    ),
    'orcamini-platy': (
        '{slices: [{sources: [{model: o/a, layer_range: [0, 24]}]}, {sources: [{model: o/b, '
        'layer_range: [20, 40]}]}], merge_method: passthrough, dtype: float16}'
    ),
    'linear': (
        '{models: [{model: o/a, parameters: {weight: 1.0}}, {model: o/b, parameters: {weight: 0.3}}, '
        '{model: o/c, parameters: {weight: 0.5}}], merge_method: linear, dtype: float16}'
    ),
}

@pytest.fixture(scope='module')
def forty(tmp_path_factory):
    "Tiny models with forty layers, by the names of the examples."
    from transformers import LlamaConfig, LlamaForCausalLM
    root, found = tmp_path_factory.mktemp('forty'), {}
    for i, name in enumerate(('base', 'a', 'b', 'c')):
        torch.manual_seed(i)
        config = LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=40,
            num_attention_heads=1,
            vocab_size=12,
            max_position_embeddings=8,
        )
        LlamaForCausalLM(config).save_pretrained(root/name)
        found[f'o/{name}'] = str(root/name)
    return found

@pytest.mark.parametrize('name', EXAMPLES)
def test_mergekits_examples(name, forty, tmp_path):
    (tmp_path/'config.yml').write_text(EXAMPLES[name])
    out = fusionbook.merge(tmp_path/'config.yml', tmp_path/'out', hub_mirror=forty)
    sd = load_file(out/'model.safetensors')
    assert json.loads((out / 'config.json').read_text())['num_hidden_layers'] == (
        44 if name == 'orcamini-platy' else 40
    )
    assert (out/'merge.yml').read_text() == EXAMPLES[name] and all(t.isfinite().all() for t in sd.values())

def test_gradient_of_slerp(forty, tmp_path):
    "t of a gradient at layer 13 of 40 and of a filter, by the formula."
    (tmp_path/'config.yml').write_text(EXAMPLES['gradient-slerp'].replace('float16', 'float32'))
    sd = load_file(
        fusionbook.merge(tmp_path / 'config.yml', tmp_path / 'out', hub_mirror=forty) / 'model.safetensors'
    )
    a, b = (load_file(Path(forty[f'o/{n}'])/'model.safetensors') for n in 'ab')
    name, place = 'model.layers.13.mlp.up_proj.weight', 13/39*4
    values = [1, .5, .7, .3, 0]
    t = values[1]*(1 - (place - 1)) + values[2]*(place - 1)
    x, y = (m[name].double().flatten() for m in (a, b))
    angle = torch.arccos(x@y/x.norm()/y.norm())
    want = (torch.sin((1 - t)*angle)*x + torch.sin(t*angle)*y)/torch.sin(angle)
    assert torch.allclose(sd[name].double().flatten(), want, atol=1e-6)


def plain(folder, name, seed, size=64, **config):
    "A folder with a few tensors."
    g = torch.Generator().manual_seed(seed)
    sd = {'embed.weight': torch.randn(8, size, generator=g)} | {
        f'h.{i}.w': torch.randn(size, size, generator=g) for i in range(4)
    }
    (folder/name).mkdir(parents=True, exist_ok=True)
    save_file(sd, folder/name/'model.safetensors')
    (folder/name/'config.json').write_text(json.dumps({'model_type': 'tiny'} | config))
    return str(folder/name)

def test_a_module_of_slices_is_its_slices(tmp_path):
    "mergekit's `modules` with the one stack that a language model has: the same bytes as its slices alone."
    a, b = (plain(tmp_path, n, i, num_hidden_layers=4) for i, n in enumerate('ab', 1))
    slices = [
        {'sources': [{'model': a, 'layer_range': [0, 3]}]},
        {'sources': [{'model': b, 'layer_range': [1, 4]}]},
    ]
    told = {'slices': dict(slices=slices), 'modules': dict(modules={'text_decoder': {'slices': slices}})}
    found = [
        load_file(
            fusionbook.merge(merge_method='passthrough', **keys, out=tmp_path / name) / 'model.safetensors'
        )
        for name, keys in told.items()
    ]
    assert (
        found[0].keys() == found[1].keys()
        and len(found[0]) == 7
        and all(t.equal(found[1][k]) for k, t in found[0].items())
    )
    with pytest.raises(FusionError, match='one module for the stack `h` of .*, got `encoder` and `decoder`'):
        fusionbook.merge(
            merge_method='passthrough',
            modules={n: {'slices': slices} for n in ('encoder', 'decoder')},
            out=tmp_path / 'never',
        )

def test_encoder_and_decoder_have_slices_of_their_own(tmp_path):
    """Layers of two T5, as deep as the recipe says: the network that transformers opens answers as one put
    together by hand."""
    (x, y), inputs, (a, b) = made('t5', tmp_path, 2)

    def given(*slices):
        return {'slices': [{'sources': [{'model': m, 'layer_range': list(r)}]} for m, *r in slices]}
    modules = {'encoder': given((a, 0, 1), (b, 0, 2)), 'decoder': given((b, 1, 2))}
    out = fusionbook.merge(merge_method='passthrough', modules=modules, out=tmp_path/'out')
    opened = type(x).from_pretrained(out).eval()
    assert (opened.config.num_layers, opened.config.num_decoder_layers) == (3, 1)
    bias = y.decoder.block[1].layer[0].SelfAttention
    bias.relative_attention_bias, bias.has_relative_attention_bias = (
        y.decoder.block[0].layer[0].SelfAttention.relative_attention_bias,
        True,
    )
    later = y.encoder.block[0].layer[0].SelfAttention
    later.relative_attention_bias, later.has_relative_attention_bias = None, False
    x.encoder.block = torch.nn.ModuleList([x.encoder.block[0], *y.encoder.block])
    x.decoder.block = torch.nn.ModuleList([y.decoder.block[1]])
    x.encoder.final_layer_norm, x.decoder.final_layer_norm = (
        y.encoder.final_layer_norm,
        y.decoder.final_layer_norm,
    )
    assert load_file(out/'model.safetensors').keys() <= x.state_dict().keys()
    assert torch.allclose(answers(opened, inputs), answers(x, inputs), atol=1e-6)

def test_modules_with_all_layers_are_the_models(tmp_path):
    "Every stack with all of its layers: the bytes of `models`."
    _, _, (base, a, b) = made('t5', tmp_path)
    sources = [{'model': m, 'parameters': {'weight': w}} for m, w in ((a, .5), (b, .25))]
    slices = [{'sources': [dict(s, layer_range=[0, 2]) for s in sources]}]
    told = {
        'models': {'models': sources},
        'modules': {'modules': {n: {'slices': slices} for n in ('encoder', 'decoder')}},
    }
    told['models of modules'] = {'modules': {n: {'models': sources} for n in ('encoder', 'decoder')}}
    found = [
        load_file(
            fusionbook.merge(merge_method='task_arithmetic', base_model=base, **keys, out=tmp_path / n)
            / 'model.safetensors'
        )
        for n, keys in told.items()
    ]
    assert all(
        found[0].keys() == f.keys() and all(t.equal(f[n]) for n, t in found[0].items()) for f in found[1:]
    )


def test_a_share_for_each_model(tmp_path):
    """DARE keeps all of one model and half of another: what is added where the second lost everything is the
    first's."""
    base, a, b = (plain(tmp_path, n, i) for i, n in enumerate(('base', 'a', 'b')))
    models = [{'model': m, 'parameters': {'weight': 1, 'density': d}} for m, d in ((a, 1.), (b, .5))]
    out = fusionbook.merge(
        merge_method='dare_linear',
        base_model=base,
        models=models,
        parameters={'rescale': False},
        out=tmp_path / 'out',
    )
    merged, x, y, z = (load_file(Path(f)/'model.safetensors')['h.0.w'] for f in (out, base, a, b))
    lost = torch.isclose(merged - x, y - x, atol=1e-5)
    kept = torch.isclose(merged - x, y - x + (z - x), atol=1e-5)
    assert (lost | kept).all() and .45 < lost.float().mean() < .55


@pytest.mark.parametrize('name', ['della', 'della_linear', 'breadcrumbs', 'breadcrumbs_ties'])
def test_shares_of_each_model(name, tmp_path):
    "A model that keeps everything is added as it is; one that keeps half of its entries, half of them."
    base, a, b = (plain(tmp_path, n, i) for i, n in enumerate(('base', 'a', 'b')))
    more = {'epsilon': .2} if 'della' in name else {'gamma': .1}
    models = [
        {'model': m, 'parameters': {'weight': w, 'density': d} | more}
        for m, w, d in ((a, 0.0, 1.0), (b, 1.0, 0.5))
    ]
    told = dict(merge_method=name, base_model=base, parameters={'rescale': False, 'normalize': False})
    def moved(models, out):
        out = fusionbook.merge(**told, models=models, out=tmp_path/out)
        return (
            load_file(Path(out) / 'model.safetensors')['h.0.w']
            - load_file(Path(base) / 'model.safetensors')['h.0.w']
        )
    half = moved(models, 'half')
    models[0]['parameters']['weight'], models[1]['parameters']['weight'] = 1., 0.
    full = moved(models, 'full')
    x, y = (
        load_file(Path(f) / 'model.safetensors')['h.0.w']
        - load_file(Path(base) / 'model.safetensors')['h.0.w']
        for f in (a, b)
    )
    assert torch.allclose(full, x, atol=1e-5)
    kept = torch.isclose(half, y, atol=1e-5)
    assert (kept | (half.abs() < 1e-5)).all() and .45 < kept.float().mean() < .55


def test_plain_float8_is_read_exactly(tmp_path):
    "Numbers of eight bits are numbers of bfloat16; with a scale beside them they are refused."
    folder = Path(plain(tmp_path, 'small', 1))
    sd = load_file(folder/'model.safetensors')
    small = {k: t.to(torch.float8_e4m3fn) for k, t in sd.items()}
    save_file(small, folder/'model.safetensors')
    out = fusionbook.merge(method='simple_average', models=[str(folder)], out=tmp_path/'out')
    assert all(
        t.dtype == torch.bfloat16 and t.equal(small[k].bfloat16())
        for k, t in load_file(out / 'model.safetensors').items()
    )
    save_file(small | {'h.0.w_scale': torch.ones(1)}, folder/'model.safetensors')
    with pytest.raises(FusionError, match='a quantised model .*float8_e4m3'):
        fusionbook.merge(method='simple_average', models=[str(folder)], out=tmp_path / 'never')


def in_eight_bits(source, folder, scales, block=(8, 8), **told):
    """A model whose matrices are codes with scales, beside which stand scales of activations; the weights
    that they stand for."""
    shutil.copytree(source, folder)
    stored, weights = {}, load_file(folder/'model.safetensors')
    for n, w in list(weights.items()):
        if not n.endswith('proj.weight'): stored[n] = w; continue
        rows, columns = w.shape if scales == 'tensor' else (1, w.shape[1]) if scales == 'row' else block
        tiles = [
            [w[i : i + rows, j : j + columns] for j in range(0, w.shape[1], columns)]
            for i in range(0, w.shape[0], rows)
        ]
        s = torch.stack([torch.stack([t.abs().max() / 448 for t in row]) for row in tiles])
        wide = s.repeat_interleave(rows, 0)[:w.shape[0]].repeat_interleave(columns, 1)[:, :w.shape[1]]
        stored[n] = (w / wide).to(torch.float8_e4m3fn)
        stored[f'{n}_scale' + '_inv' * (scales == 'block')] = s.reshape(()) if scales == 'tensor' else s
        stored[n.replace('weight', 'input_scale')] = torch.ones(1)
        weights[n] = (stored[n].double() * wide.double()).float()
    save_file(stored, folder/'model.safetensors', {'format': 'pt'})
    config = json.loads((folder/'config.json').read_text())
    told = {'quant_method': 'fp8'} | ({'weight_block_size': list(block)} if scales == 'block' else {}) | told
    (folder/'config.json').write_text(json.dumps(config | {'quantization_config': told}))
    return weights

@pytest.mark.parametrize('scales', ['tensor', 'row', 'block'])
def test_float8_with_scales_is_read_as_its_products(scales, tmp_path, capsys):
    """Codes times scales, rounded once: the copy is those weights to the bit, opens with transformers as no
    quantised model, and the plan says how it was read."""
    networks, inputs, (a, _) = made('llama', tmp_path, 2)
    weights = in_eight_bits(Path(a), tmp_path/'eight', scales)
    told = dict(method='simple_average', models=[str(tmp_path/'eight')])
    fusionbook.merge(**told, dry_run=True)
    assert (
        'holds float8 with scales: 14 of 21 tensors are read as float32, each product rounded once'
        in capsys.readouterr().out
    )
    out = fusionbook.merge(**told, out=tmp_path/'out')
    found = load_file(out/'model.safetensors')
    assert found.keys() == weights.keys() and all(found[n].equal(w) for n, w in weights.items())
    assert 'quantization_config' not in json.loads((out/'config.json').read_text())
    assert 'holds float8 with scales' in (out/'README.md').read_text()
    opened = type(networks[0]).from_pretrained(out).eval()
    networks[0].load_state_dict(weights, strict=False)
    assert torch.equal(answers(opened, inputs), answers(networks[0], inputs))
    half = load_file(fusionbook.merge(**told, dtype='bfloat16', out=tmp_path/'half')/'model.safetensors')
    assert all(half[n].equal(w.bfloat16()) for n, w in weights.items())

def test_float8_with_scales_is_an_expert_and_a_base_like_any_other(tmp_path):
    "The same numbers as those of the model written out: as a base, and under an adapter."
    _, _, (a, b, c) = made('llama', tmp_path)
    weights = in_eight_bits(Path(a), tmp_path/'eight', 'block')
    shutil.copytree(a, tmp_path/'plain')
    save_file(weights, tmp_path/'plain'/'model.safetensors', {'format': 'pt'})
    name = 'model.layers.1.mlp.up_proj'
    adapter(tmp_path, 'lora', name, rows=24)
    low = load_file(tmp_path/'lora'/'adapter_model.safetensors')
    save_file(
        {n: t[:, :16].contiguous() if 'lora_A' in n else t for n, t in low.items()},
        tmp_path / 'lora' / 'adapter_model.safetensors',
    )
    def merged(one, out):
        models = [{'model': m, 'parameters': {'weight': .5}} for m in (f'{one}+{tmp_path}/lora', b)]
        out = fusionbook.merge(
            merge_method='task_arithmetic', base_model=str(one), models=models, out=tmp_path / out
        )
        return load_file(out/'model.safetensors')
    eight, full = merged(tmp_path/'eight', 'e'), merged(tmp_path/'plain', 'f')
    assert eight.keys() == full.keys() and all(eight[n].equal(t) for n, t in full.items())
    assert not eight[f'{name}.weight'].equal(weights[f'{name}.weight'])

@pytest.mark.parametrize(
    'scales, told, change, says',
    [
        ('row', {'quant_method': 'awq'}, {}, 'a quantised model .awq.'),
        (
            'tensor',
            {},
            {'model.layers.0.mlp.up_proj.weight_scale_2': torch.ones(1)},
            'weight_scale_2` stands beside its scale',
        ),
        ('block', {'weight_block_size': [128, 128]}, {}, 'by tensor, row or block of 128 × 128'),
        (
            'tensor',
            {},
            {'model.layers.0.mlp.up_proj.weight': torch.ones(24, 16, dtype=torch.int8)},
            'scales codes that are no float8',
        ),
    ],
)
def test_codes_that_are_not_surely_products_are_refused(scales, told, change, says, tmp_path):
    _, _, (a,) = made('llama', tmp_path, 1)
    in_eight_bits(Path(a), tmp_path/'eight', scales, **told)
    file = tmp_path/'eight'/'model.safetensors'
    save_file(load_file(file) | change, file, {'format': 'pt'})
    with pytest.raises(FusionError, match=says):
        fusionbook.merge(method='simple_average', models=[str(tmp_path / 'eight')], out=tmp_path / 'out')
    assert not (tmp_path/'out').exists()


def bytes_of(folder): return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}

def test_killed_and_started_again(tmp_path):
    """Killed without warning while it writes: no output is there; the next start goes on and ends with the
    same bytes."""
    base, a, b = (plain(tmp_path, n, i, 1500) for i, n in enumerate(('base', 'a', 'b')))
    line = [
        'merge',
        'merge_method=ties',
        f'base_model={base}',
        (
            f'models=[{{model: {a}, parameters: {{weight: 1, density: .3}}}}, '
            f'{{model: {b}, parameters: {{weight: 1, density: .3}}}}]'
        ),
    ]
    done = warm.run(*line, tmp_path/'whole', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    room = unfinished_room(tmp_path/'out')
    p = warm.Started(*line, tmp_path/'out', cwd=tmp_path)
    while p.poll() is None and not (
        (room / 'journal').exists() and (room / 'journal').read_text().count('\n') > 2
    ):
        time.sleep(0.005)
    p.kill(); p.wait()
    assert not (tmp_path/'out').exists() and room.exists()
    with pytest.raises(FusionError):
        fusionbook.merge(method='simple_average', models=[str(room)], out=tmp_path / 'x')
    again = warm.run(*line, tmp_path/'out', cwd=tmp_path)
    assert 'going on after' in again.stdout and not room.exists()
    assert bytes_of(tmp_path/'out') == bytes_of(tmp_path/'whole')

def test_a_changed_source_is_noticed(tmp_path, capsys, monkeypatch):
    a, b = (plain(tmp_path, n, i, num_hidden_layers=4) for i, n in enumerate('ab', 1))
    told = dict(method='simple_average', models=[a, b], out=tmp_path/'out')
    import fusionbook.core.resumable as resumable
    put, count = resumable._put, []
    def stop(*args):
        count.append(1)
        if len(count) == 3: raise KeyboardInterrupt
        return put(*args)
    monkeypatch.setattr(resumable, '_put', stop)
    with pytest.raises(KeyboardInterrupt): fusionbook.merge(**told)
    monkeypatch.setattr(resumable, '_put', put)
    os.utime(f'{a}/model.safetensors') # touched, not changed
    left = tmp_path/'left'
    shutil.copytree(unfinished_room(tmp_path/'out'), left)
    fusionbook.merge(**told)
    assert 'going on after 2 of 5 tensors' in capsys.readouterr().out
    shutil.rmtree(tmp_path/'out')
    shutil.copytree(left, unfinished_room(tmp_path/'out'))
    plain(tmp_path, 'a', 3)
    fusionbook.merge(**told)
    assert f'of `{a}` has changed since' in capsys.readouterr().out
    mean = sum(load_file(f'{m}/model.safetensors')['h.3.w'] for m in (a, b))/2
    assert torch.equal(load_file(tmp_path/'out'/'model.safetensors')['h.3.w'], mean)

def test_a_full_disk_keeps_what_is_done(tmp_path):
    "A limit on the size of files stands for a disk that is full."
    a = plain(tmp_path, 'a', 1, 400)
    code = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1200000, 1200000)); {warm.CODE}'
    line = ['merge', 'method=simple_average', f'models=[{a}]', str(tmp_path/'out')]
    done = warm.run(*line, code=code, cwd=tmp_path)
    assert (
        done.returncode == 2
        and 'goes on from there' in done.stderr
        and 'Traceback' not in done.stderr
        and not (tmp_path / 'out').exists()
    )
    assert warm.run(*line, cwd=tmp_path).returncode == 0 and (tmp_path/'out').exists()


def test_files_of_all_kinds(tmp_path):
    "A snapshot of links, shards, a pickle and a checkpoint of Lightning hold one model."
    a = plain(tmp_path, 'a', 1)
    sd = load_file(f'{a}/model.safetensors')
    (tmp_path/'bin').mkdir(); torch.save(sd, tmp_path/'bin'/'pytorch_model.bin')
    torch.save({'state_dict': {f'model.{k}': v for k, v in sd.items()}, 'epoch': 1}, tmp_path/'light.ckpt')
    torch.save({f'module.{k}': v for k, v in sd.items()}, tmp_path/'parallel.pt')
    from fusionbook.core.checkpoint import save
    save(sd, tmp_path/'shards', shard_size=20000)
    blobs, snapshot = tmp_path/'hub'/'blobs', tmp_path/'hub'/'snapshots'/'1'
    blobs.mkdir(parents=True); snapshot.mkdir(parents=True)
    shutil.copy(f'{a}/model.safetensors', blobs / 'ab12')
    (snapshot / 'model.safetensors').symlink_to('../../blobs/ab12')
    models = [
        a,
        *map(
            str,
            (
                tmp_path / 'bin',
                tmp_path / 'light.ckpt',
                tmp_path / 'parallel.pt',
                tmp_path / 'shards',
                snapshot,
            ),
        ),
    ]
    out = load_file(
        fusionbook.merge(method='simple_average', models=models, out=tmp_path / 'out') / 'model.safetensors'
    )
    assert all(torch.allclose(out[k], sd[k], atol=1e-6) for k in sd) and out.keys() == sd.keys()

def test_dry_run_is_quick_and_light(tmp_path):
    "A hundred shards: planned without torch, in less than two seconds of the processor."
    from fusionbook.core.checkpoint import save
    g = torch.Generator().manual_seed(0)
    sd = {f'h.{i}.w': torch.randn(4, 4, generator=g) for i in range(100)}
    for n in 'ab': save(sd, tmp_path/n, shard_size=64)
    assert len(list((tmp_path/'a').glob('*.safetensors'))) == 100
    code = (
        "import sys, time; from fusionbook.bench.cli import main; main(); print('torch' in "
        "sys.modules, time.process_time())"
    )
    line = [
        'merge',
        'merge_method=linear',
        (
            f'models=[{{model: {tmp_path}/a, parameters: {{weight: [0, 1]}}}}, '
            f'{{model: {tmp_path}/b, parameters: {{weight: 1}}}}]'
        ),
        'out',
        '--dry-run',
    ]
    done = subprocess.run([sys.executable, '-c', code, *line], capture_output=True, text=True, cwd=tmp_path)
    torch_there, seconds = done.stdout.split()[-2:]
    assert (
        torch_there == 'False'
        and float(seconds) < 2
        and 'writes    100 tensors' in done.stdout
        and not (tmp_path / 'out').exists()
    ), done.stdout + done.stderr


def spoilt(folder, name, change):
    "A model whose file was changed."
    path = Path(plain(folder, name, 5))
    change(path/'model.safetensors')
    return str(path)

def cut(file): file.write_bytes(file.read_bytes()[:-100])
def lost(file):
    file.with_name('model.safetensors.index.json').write_text(
        json.dumps({'weight_map': {'h.0.w': 'model-00001-of-00002.safetensors'}})
    )
    file.unlink()

BAD = {
    'expected the shards of': lambda f, a: dict(models=[a, spoilt(f, 'lost', lost)]),
    'damaged or cut': lambda f, a: dict(models=[a, spoilt(f, 'cut', cut)]),
    'models of one architecture, got tiny in': lambda f, a: dict(
        models=[a, plain(f, 'other', 6, model_type='bert')]
    ),
    'with one shape': lambda f, a: dict(models=[a, plain(f, 'wide', 6, 32)]),
    'from 0 to 4, got `layer_range` [2, 9]': lambda f, a: dict(
        slices=[{'sources': [{'model': a, 'layer_range': [2, 9]}]}]
    ),
    'each model once in a block': lambda f, a: dict(
        slices=[{'sources': [{'model': a, 'layer_range': [0, 2]}, {'model': a, 'layer_range': [1, 3]}]}]
    ),
    'a list over the layers': lambda f, a: dict(models=[a], parameters={'weight': []}),
    'a filter of `weight` that matches a tensor, got `mpl`': lambda f, a: dict(
        models=[a], parameters={'weight': [{'filter': 'mpl', 'value': 1}, {'value': 2}]}
    ),
    'did you mean `linear`': lambda f, a: dict(models=[a], merge_method='liner'),
    'did you mean `weight`': lambda f, a: dict(models=[a], parameters={'wieght': 1}),
    'got none for `embed.weight`': lambda f, a: dict(models=[a]),
    'which also holds thesis.txt': lambda f, a: dict(models=[a], parameters={'weight': 1}, out=holding(f)),
    'apart from its sources': lambda f, a: dict(models=[a], parameters={'weight': 1}, out=f'{a}/inner'),
    'got the file': lambda f, a: dict(models=[a], parameters={'weight': 1}, out=str(file_there(f))),
    'that can be written': lambda f, a: dict(models=[a], parameters={'weight': 1}, out='/proc/merged'),
    'a quantised model': lambda f, a: dict(models=[a, quantised(f)], parameters={'weight': 1}),
    'GGUF': lambda f, a: dict(models=[a, gguf(f)], parameters={'weight': 1}),
    'a base for the adapter': lambda f, a: dict(models=[a, adapter(f, 'lora')], parameters={'weight': 1}),
    'write `org/other+': lambda f, a: dict(models=[adapter(f, 'lora')], parameters={'weight': 1}),
    'got one of another base: it changes `q.weight`': lambda f, a: dict(
        models=[adapter(f, 'lora', 'q')], base_model=weighted(f), parameters={'weight': 1}
    ),
    'got factors of another base: (5, 1) and (1, 64)': lambda f, a: dict(
        models=[f'{weighted(f)}+{adapter(f, "lora", rows=5)}'], parameters={'weight': 1}
    ),
    'with two; merge the adapters': lambda f, a: dict(
        models=[f'{weighted(f)}+{adapter(f, "lora")}+{adapter(f, "lora")}'], parameters={'weight': 1}
    ),
    'expected a LoRA adapter, got `peft_type`': lambda f, a: dict(
        models=[f'{weighted(f)}+{adapter(f, "lora", peft_type="LOHA")}'], parameters={'weight': 1}
    ),
    'factors of rank 2': lambda f, a: dict(
        models=[f'{weighted(f)}+{adapter(f, "lora", r=2)}'], parameters={'weight': 1}
    ),
    'damaged or cut one: `': lambda f, a: dict(
        models=[f'{weighted(f)}+{cut_adapter(f)}'], parameters={'weight': 1}
    ),
    'expected `adapter_model.safetensors` in': lambda f, a: dict(
        models=[a, empty_adapter(f)], base_model=a, parameters={'weight': 1}
    ),
    'or lies in it': lambda f, a: dict(
        models=[f'{weighted(f)}+{adapter(f, "lora")}'], parameters={'weight': 1}, out=f'{f}/lora/inner'
    ),
    'need': lambda f, a: dict(models=[a], parameters={'weight': 1}, max_memory=1000),
    '`max_memory` as bytes': lambda f, a: dict(models=[a], parameters={'weight': 1}, max_memory='much'),
}

def holding(folder):
    plain(folder, 'holding', 7)
    (folder/'holding'/'thesis.txt').write_text('mine')
    return str(folder/'holding')
def file_there(folder):
    (folder/'file').write_text('mine')
    return folder/'file'
def quantised(folder):
    path = plain(folder, 'quantised', 7)
    Path(path, 'config.json').write_text(
        '{"model_type": "tiny", "quantization_config": {"quant_method": "awq"}}'
    )
    return path
def gguf(folder):
    (folder/'model.gguf').write_bytes(b'GGUF' + bytes(60))
    return str(folder/'model.gguf')
def weighted(folder):
    (folder/'base').mkdir(exist_ok=True)
    save_file({f'h.{i}.w.weight': torch.ones(64, 64) for i in range(2)}, folder/'base'/'model.safetensors')
    return str(folder/'base')
def adapter(folder, name, module='h.0.w', rows=64, **config):
    (folder/name).mkdir(exist_ok=True)
    stem = f'base_model.model.{module}.lora_'
    save_file(
        {f'{stem}A.weight': torch.ones(1, 64), f'{stem}B.weight': torch.ones(rows, 1)},
        folder / name / 'adapter_model.safetensors',
    )
    told = dict(peft_type='LORA', r=1, lora_alpha=1, base_model_name_or_path='org/other') | config
    (folder/name/'adapter_config.json').write_text(json.dumps(told))
    return str(folder/name)
def cut_adapter(folder):
    cut(Path(adapter(folder, 'lora'))/'adapter_model.safetensors')
    return folder/'lora'
def empty_adapter(folder):
    path = adapter(folder, 'lora')
    Path(path, 'adapter_model.safetensors').unlink()
    return path

@pytest.mark.parametrize('says', BAD)
def test_bad_input_is_one_line(says, tmp_path):
    "One clear line before expensive work; nothing is written, nothing lost."
    a = plain(tmp_path, 'a', 1)
    told = dict(merge_method='linear', out=str(tmp_path/'out')) | BAD[says](tmp_path, a)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(FusionError) as caught: fusionbook.merge(**told)
    assert says in str(caught.value) and '\n' not in str(caught.value)
    assert sorted(tmp_path.rglob('*')) == before

def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    a = plain(tmp_path, 'a', 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FusionError, match='expected room for 67.6 kB'):
        fusionbook.merge(method='simple_average', models=[a], out=tmp_path / 'out')

def test_code_of_a_configuration_is_neither_run_nor_copied(tmp_path, capsys):
    a = plain(tmp_path, 'a', 1, auto_map={'AutoModel': 'code.Model'})
    Path(a, 'code.py').write_text('raise SystemExit')
    out = fusionbook.merge(method='simple_average', models=[a], out=tmp_path/'out')
    assert (
        'neither run nor copied' in capsys.readouterr().out
        and 'auto_map' not in (out / 'config.json').read_text()
        and not (out / 'code.py').exists()
    )

def test_import_is_light():
    assert (
        subprocess.run(
            [sys.executable, '-c', "import sys, fusionbook; fusionbook.merge; print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
        ).stdout
        == 'False\n'
    )


def talking(folder, name, seed, extra=()):
    "A tiny Llama with a tokenizer of words, and some more of its own."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ['<unk>', '<s>', '</s>', *'abcd']
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token='<unk>', bos_token='<s>', eos_token='</s>'
    )
    tokenizer.add_tokens(list(extra))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder/name)
    tokenizer.save_pretrained(folder/name)
    return str(folder/name)

def test_words_are_merged_by_word(tmp_path, capsys):
    """Two models grew by other words in the same row: refused as rows, merged by word; the tokenizer of the
    result knows all of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, x, y = (
        talking(tmp_path, 'base', 0),
        talking(tmp_path, 'x', 1, ['X']),
        talking(tmp_path, 'y', 2, ['Y', 'X']),
    )
    told = dict(
        merge_method='linear',
        base_model=base,
        models=[{'model': m} for m in (x, y)],
        parameters={'weight': 1},
    )
    with pytest.raises(
        FusionError, match='merge them by word .`tokenizer_source: union`, or `base`., or leave embeddings'
    ):
        fusionbook.merge(**told, out=tmp_path / 'out')
    out = fusionbook.merge(
        **told,
        tokenizer={'source': 'union', 'pad_to_multiple_of': 4},
        chat_template='chatml',
        out=tmp_path / 'out',
    )
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = {w: tokenizer.convert_tokens_to_ids(w) for w in ('a', 'X', 'Y')}
    assert (
        ids == {'a': 3, 'X': 7, 'Y': 8}
        and tokenizer('a X b Y')['input_ids'] == [3, 7, 4, 8]
        and model.config.vocab_size == 12
    )
    rows = {
        n: load_file(Path(m) / 'model.safetensors')['model.embed_tokens.weight']
        for n, m in (('x', x), ('y', y))
    }
    own = model.get_input_embeddings().weight
    for row, want in {
        3: (rows['x'][3] + rows['y'][3]) / 2,
        7: (rows['x'][7] + rows['y'][8]) / 2,
        8: rows['y'][7],
        11: own[:9].mean(0),
    }.items():
        assert torch.allclose(own[row], want, atol=1e-6), row
    assert (
        tokenizer.apply_chat_template([dict(role='user', content='a')], tokenize=False)
        == '<|im_start|>user\na<|im_end|>\n'
    )
    kept = fusionbook.merge(
        **{k: v for k, v in told.items() if k != 'tokenizer'}, tokenizer_source='base', out=tmp_path / 'kept'
    )
    assert load_file(kept/'model.safetensors')['lm_head.weight'].shape[0] == 7


def test_a_device_gives_the_numbers_of_the_processor(tmp_path):
    """TIES and a spherical mean, streamed through an accelerator that is made of the processor: no tensor is
    forgotten on the other side."""
    base, a, b = (plain(tmp_path, n, i) for i, n in enumerate(('base', 'a', 'b')))
    code = '''
import pretend_device, sys
from fusionbook.bench.merge_plan import plan_merge
from fusionbook.bench.merge_run import write_merge
from fusionbook.bench.recipe_file import recipe_from
base, a, b, out = sys.argv[1:]
models = [{'model': m, 'parameters': {'weight': w}} for m, w in ((a, 1), (b, .5))]
for method, more in {'ties': {'density': .4}, 'multislerp': {}}.items():
    plan = plan_merge(recipe_from({'merge_method': method, 'base_model': base, 'models': models, 'parameters': more}))
    for device in ('cpu', 'pretend'): write_merge(plan, f'{out}/{method}_{device}', device=device)
'''
    here = Path(__file__).parent
    env = os.environ | {
        'PYTHONPATH': os.pathsep.join(filter(None, [str(here), os.environ.get('PYTHONPATH')]))
    }
    done = subprocess.run(
        [sys.executable, '-c', code, base, a, b, str(tmp_path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for method in ('ties', 'multislerp'):
        cpu, device = (load_file(tmp_path/f'{method}_{d}'/'model.safetensors') for d in ('cpu', 'pretend'))
        assert all(torch.allclose(cpu[k], device[k], atol=1e-6) for k in cpu), method
