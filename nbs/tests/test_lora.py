"""Adapters as PEFT writes and runs them: what we expand answers as PEFT's own forward pass, in every variant
that is a weight afterwards."""
import json, tempfile, warnings, zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import fusionbook
from fusionbook.core.checkpoint import Checkpoint, save
from fusionbook.models.hub import hub_network, module_names
from fusionbook.models.lora import adapted
from networks import NETS

QV, ALL = ['q_proj', 'v_proj'], ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj']
VARIANTS = {  # name -> (network, settings of PEFT)
    'plain': ('llama', dict(r=3, lora_alpha=5, target_modules=ALL)),
    'rslora': ('llama', dict(r=3, lora_alpha=5, target_modules=QV, use_rslora=True)),
    'patterns': (
        'llama',
        dict(
            r=3,
            target_modules=QV,
            rank_pattern={'v_proj': 2, r'layers\.1\.self_attn\.q_proj': 5},
            alpha_pattern={'^model.layers.0.self_attn.q_proj': 20, '.*v_proj': 7},
            use_rslora=True,
        ),
    ),
    'dora': ('llama', dict(r=3, lora_alpha=5, target_modules=ALL, use_dora=True)),
    'dora_rslora': ('llama', dict(r=3, lora_alpha=5, target_modules=ALL, use_dora=True, use_rslora=True)),
    'embedding': ('llama', dict(r=2, lora_alpha=3, target_modules=['embed_tokens', 'q_proj'])),
    'embedding_dora': (
        'llama',
        dict(r=2, lora_alpha=3, target_modules=['embed_tokens', 'q_proj'], use_dora=True),
    ),
    'head': ('llama', dict(r=2, lora_alpha=3, target_modules=['lm_head', 'q_proj'])),
    'saved': (
        'llama',
        dict(
            r=2, lora_alpha=3, target_modules=['q_proj'], modules_to_save=['embed_tokens', 'lm_head', 'norm']
        ),
    ),
    'biases': ('bert', dict(r=2, lora_alpha=3, target_modules=['query'], bias='all', task_type='SEQ_CLS')),
    'own_biases': (
        'bert',
        dict(r=2, lora_alpha=3, target_modules=['query', 'value'], bias='lora_only', task_type='SEQ_CLS'),
    ),
    'lora_bias': (
        'bert',
        dict(r=2, lora_alpha=3, target_modules=['query', 'dense'], lora_bias=True, task_type='SEQ_CLS'),
    ),
    'lora_bias_rslora': (
        'bert',
        dict(r=2, lora_alpha=3, target_modules=['query', 'value', 'dense'], lora_bias=True, use_rslora=True),
    ),
    'conv1d': (
        'gpt2',
        dict(r=2, lora_alpha=3, target_modules=['c_attn', 'c_proj', 'c_fc'], fan_in_fan_out=True),
    ),
    'conv1d_dora': (
        'gpt2',
        dict(
            r=2, lora_alpha=3, target_modules=['c_attn', 'c_proj', 'c_fc'], fan_in_fan_out=True, use_dora=True
        ),
    ),
    'conv1d_unsaid': ('gpt2_classes', dict(r=2, lora_alpha=3, target_modules=['c_attn', 'c_proj', 'score'])),
    't5': ('t5', dict(r=2, lora_alpha=3, target_modules=['q', 'v', 'wo'])),
    'clip': ('clip_vision', dict(r=2, lora_alpha=3, target_modules=QV)),
    'clip_dora': (
        'clip_vision',
        dict(r=2, lora_alpha=3, target_modules=QV + ['fc1'], use_dora=True, use_rslora=True),
    ),
    'kernels': (
        'resnet',
        dict(r=2, lora_alpha=3, target_modules='.*convolution', modules_to_save=['classifier']),
    ),
    'kernels_dora': ('resnet', dict(r=2, lora_alpha=3, target_modules='.*convolution', use_dora=True)),
    'vit': (
        'vit',
        dict(
            r=2,
            lora_alpha=3,
            target_modules=['q_proj', 'v_proj', 'query', 'value'],
            modules_to_save=['classifier'],
        ),
    ),
    'mixtral': ('mixtral', dict(r=2, lora_alpha=3, target_modules=['q_proj', 'v_proj'])),
}

STORED = Path(__file__).parent/'oracle'/'peft_lora.json'

def wave(name, shape, size=.3):
    "Numbers that belong to a name, the same on every machine."
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (size*torch.sin(1.37*t + zlib.crc32(name.encode())%997)).float().view(*shape)

def network_of(kind):
    "A network of such numbers, and its inputs."
    make, inputs = NETS[kind]
    network = make().eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(wave(name, p.shape) + (p.ndim == 1 and name.endswith('weight')))
    return network, inputs

def tensors_of(shapes, network):
    "The tensors of an adapter's file; what PEFT copies from the base is the base's."
    own = network.state_dict()
    def tensor(name, shape):
        if 'base_layer.weight' in name:
            return own[name.removeprefix('base_model.model.').replace('.base_layer', '')].clone()
        return wave(name, shape) + ('magnitude' in name or 'norm' in name)
    return {n: tensor(n, shape) for n, shape in shapes.items()}

def answers(network, inputs):
    with torch.no_grad(): out = network(**inputs)
    return out.logits if hasattr(out, 'logits') else out.pooler_output

def expanded(base, adapter):
    config = json.loads((base/'config.json').read_text())
    return adapted(Checkpoint(base), adapter, config=config, modules=partial(module_names, base))

def by_peft(variant, folder):
    "The adapter as PEFT saves it, and what PEFT's network answers."
    import peft
    kind, settings = VARIANTS[variant]
    network, inputs = network_of(kind)
    network.save_pretrained(folder/'base')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = peft.get_peft_model(network, peft.LoraConfig(**settings)).eval()
        shapes = {n: tuple(x.shape) for n, x in peft.get_peft_model_state_dict(model).items()}
        peft.set_peft_model_state_dict(model, tensors_of(shapes, network_of(kind)[0]))
        model.save_pretrained(folder/'adapter')
    return folder/'base', folder/'adapter', answers(model, inputs)

def check(base, adapter, wanted, inputs):
    ours, plain, size = (
        answers(hub_network(base, expanded(base, adapter), None), inputs),
        answers(hub_network(base, Checkpoint(base), None), inputs),
        wanted.abs().max(),
    )
    assert (wanted - plain).abs().max() > 1e-3 * size and (ours - wanted).abs().max() < 2e-5 * size, (
        (wanted - plain).abs().max() / size,
        (ours - wanted).abs().max() / size,
    )


@pytest.mark.parametrize('variant', VARIANTS)
def test_an_expanded_adapter_answers_as_peft_did(variant, tmp_path):
    """The answers that PEFT 0.21.2 gave, stored; adapters and bases are made of numbers that belong to their
    names."""
    told = json.loads(STORED.read_text())[variant]
    network, inputs = network_of(VARIANTS[variant][0])
    network.save_pretrained(tmp_path/'base')
    save(tensors_of(told['shapes'], network), tmp_path/'adapter'/'adapter_model.safetensors')
    (tmp_path/'adapter'/'adapter_config.json').write_text(json.dumps(told['config']))
    check(tmp_path/'base', tmp_path/'adapter', torch.tensor(told['answers']).view(told['shape']), inputs)


@pytest.mark.parametrize(
    'kind, variant, moved',
    [
        ('CLIPVisionModelPool', 'clip', 'vision_model.'),
        ('CLIPVisionModelPool', 'clip_dora', ''),
        ('PeftModelForSeq2SeqLMPool', 't5', ''),
        ('CausalLMPool', 'dora_rslora', ''),
        ('AutoModelPool', 'vit', ''),
    ],
)
def test_adapters_are_experts_of_pools(kind, variant, moved, tmp_path):
    """The network that a pool makes of an adapter answers as PEFT did, also where an older release of
    transformers had longer names."""
    from fusionbook import modelpool
    told = json.loads(STORED.read_text())[variant]
    network, inputs = network_of(VARIANTS[variant][0])
    network.save_pretrained(tmp_path/'base')
    tensors = {
        n.replace('base_model.model.', f'base_model.model.{moved}'): x
        for n, x in tensors_of(told['shapes'], network).items()
    }
    save(tensors, tmp_path/'adapter'/'adapter_model.safetensors')
    (tmp_path/'adapter'/'adapter_config.json').write_text(json.dumps(told['config']))
    pool = getattr(modelpool, kind)({'_pretrained_': str(tmp_path/'base'), 'a': str(tmp_path/'adapter')})
    wanted = torch.tensor(told['answers']).view(told['shape'])
    assert (answers(pool.load_model('a'), inputs) - wanted).abs().max() < 2e-5*wanted.abs().max()


@pytest.mark.parametrize('variant', ['patterns', 'dora', 'saved', 'own_biases', 'conv1d', 'vit'])
def test_a_merge_of_files_takes_adapters(variant, tmp_path):
    """An adapter as the one model of a merge, written and opened by transformers, answers as PEFT did; alone
    on its base, and behind a `+`."""
    told = json.loads(STORED.read_text())[variant]
    network, inputs = network_of(VARIANTS[variant][0])
    network.save_pretrained(tmp_path/'base')
    save(tensors_of(told['shapes'], network), tmp_path/'adapter'/'adapter_model.safetensors')
    (tmp_path/'adapter'/'adapter_config.json').write_text(json.dumps(told['config']))
    base, adapter, wanted = (
        str(tmp_path / 'base'),
        str(tmp_path / 'adapter'),
        torch.tensor(told['answers']).view(told['shape']),
    )
    alone = fusionbook.merge(
        merge_method='task_arithmetic',
        base_model=base,
        models=[adapter],
        parameters={'weight': 1},
        out=tmp_path / 'alone',
    )
    behind = fusionbook.merge(
        merge_method='linear', models=[f'{base}+{adapter}'], parameters={'weight': 1}, out=tmp_path / 'behind'
    )
    for out in (alone, behind):
        opened = type(network).from_pretrained(out).eval()
        assert (answers(opened, inputs) - wanted).abs().max() < 1e-4*wanted.abs().max()
    assert '| adapter |' in (alone/'README.md').read_text()


@pytest.mark.parametrize('variant', VARIANTS)
def test_an_expanded_adapter_answers_as_peft(variant, tmp_path):
    "The same with PEFT itself: its own files, its own forward pass."
    pytest.importorskip(
        'peft',
        reason=(
            'the comparison with PEFT itself needs it installed; its stored answers are compared in '
            'any case'
        ),
    )
    check(*by_peft(variant, tmp_path), NETS[VARIANTS[variant][0]][1])


# ---- adapters into an adapter, as PEFT's `add_weighted_adapter`

EXACT = {
    'svd': {},
    'svd_thin': dict(svd_rank=2),
    'linear': {},
    'cat': {},
    'ties': dict(density=0.5),
    'ties_frequency': dict(density=0.5, majority_sign_method='frequency'),
    'ties_svd': dict(density=0.5),
    'magnitude_prune': dict(density=0.4),
    'magnitude_prune_svd': dict(density=0.4),
    'dare_linear': dict(density=1.0),
    'dare_ties': dict(density=1.0),
    'dare_linear_svd': dict(density=1.0),
    'dare_ties_svd': dict(density=1.0),
}

@pytest.mark.parametrize('case', EXACT)
def test_adapters_are_merged_as_peft_merges_them(case, tmp_path):
    """Three adapters, two weights above and one below zero, rsLoRA for one: the changes of every module are
    PEFT's, and PEFT opens what was written."""
    peft = pytest.importorskip('peft', reason='the comparison with PEFT itself needs it installed')
    kind, how, weights = case.partition('_thin')[0].partition('_frequency')[0], EXACT[case], [.7, -.4, 1.2]
    network, _ = network_of('gpt2')
    configs = [dict(r=3, lora_alpha=5), dict(r=3, lora_alpha=2, use_rslora=True), dict(r=3, lora_alpha=3)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, more in enumerate(configs):
            config = peft.LoraConfig(target_modules=['c_attn', 'c_proj', 'wte'], fan_in_fan_out=True, **more)
            if i == 0: model = peft.get_peft_model(network, config, adapter_name='a0')
            else: model.add_adapter(f'a{i}', config)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if 'lora_' in n: p.copy_(wave(n, p.shape))
        model.save_pretrained(tmp_path, selected_adapters=['a0', 'a1', 'a2'])
        model.add_weighted_adapter(['a0', 'a1', 'a2'], weights, 'merged', combination_type=kind, **how)
    out = fusionbook.merge_adapters(
        [str(tmp_path / f'a{i}') for i in range(3)],
        tmp_path / 'out',
        combination_type=kind,
        weights=weights,
        **how,
    )
    clean, _ = network_of('gpt2')
    clean.config.tie_word_embeddings = False
    zero = {n: torch.zeros_like(t) for n, t in clean.state_dict().items() if n != 'lm_head.weight'}
    ours, layers = (
        adapted(zero, out),
        {n: m for n, m in model.named_modules() if hasattr(m, 'get_delta_weight')},
    )
    assert len(layers) == 7
    for n, m in layers.items():
        theirs = m.get_delta_weight('merged')
        assert torch.allclose(
            ours[f'{n.removeprefix("base_model.model.")}.weight'],
            theirs,
            atol=1e-5 * theirs.abs().max().item() + 1e-7,
        ), n
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opened = peft.PeftModel.from_pretrained(network_of('gpt2')[0], out)
    for n, m in opened.named_modules():  # nothing was missed: every factor that PEFT has is ours
        if hasattr(m, 'get_delta_weight'):
            assert torch.allclose(
                m.get_delta_weight('default'),
                ours[f'{n.removeprefix("base_model.model.")}.weight'],
                atol=1e-5,
            )


# ---- an adapter out of a model

def check_left_out(found, folder):
    """T5 has one embedding under three names, of which PEFT would change one: it stays the base's, and that
    is said; the rest is the fine-tuned model."""
    assert found.left == ['shared.weight'] and 0 < found.share < 1
    ours, tuned = expanded(folder/'base', folder/'adapter'), Checkpoint(folder/'tuned')
    assert all(torch.allclose(ours[n], tuned[n], atol=1e-6) for n in tuned if n != 'shared.weight')


@pytest.mark.parametrize(
    'kind, embeddings',
    [
        ('llama', False),
        ('llama', True),
        ('llama_tied', True),
        ('llama_tied', False),
        ('gpt2', False),
        ('bert', False),
        ('t5', True),
        ('vit', False),
    ],
)
def test_an_extracted_adapter_is_the_model(kind, embeddings, tmp_path):
    """Of full rank, opened by PEFT on the base: the answers of the fine-tuned model. The same by our own
    expansion."""
    peft = pytest.importorskip('peft', reason='the comparison with PEFT itself needs it installed')
    make, inputs = NETS[kind]
    for i, name in enumerate(('base', 'tuned')):
        network = make().eval()
        with torch.no_grad():
            for n, p in network.named_parameters():
                p.copy_(
                    wave(n, p.shape)
                    + (p.ndim == 1 and n.endswith('weight'))
                    + i * wave(f'tuned {n}', p.shape, 0.03)
                )
        network.save_pretrained(tmp_path/name)
    found = fusionbook.extract_lora(
        str(tmp_path / 'tuned'), str(tmp_path / 'base'), tmp_path / 'adapter', rank=40, embeddings=embeddings
    )
    if kind == 't5': return check_left_out(found, tmp_path)
    assert found.share > 1 - 1e-9 and not found.left, found.left
    wanted = answers(network, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        opened = peft.PeftModel.from_pretrained(
            type(network).from_pretrained(tmp_path / 'base').eval(), tmp_path / 'adapter'
        ).eval()
    assert (answers(opened, inputs) - wanted).abs().max() < 1e-4*wanted.abs().max()
    ours = answers(hub_network(tmp_path/'base', expanded(tmp_path/'base', tmp_path/'adapter'), None), inputs)
    assert (ours - wanted).abs().max() < 1e-4*wanted.abs().max()


if __name__ == '__main__': # stores the answers of the PEFT that is installed
    found = {}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as d:
            base, adapter, said = by_peft(variant, Path(d))
            with safe_open(adapter / 'adapter_model.safetensors', 'pt') as f:
                shapes = {n: f.get_slice(n).get_shape() for n in f.keys()}
            config = {
                k: v
                for k, v in json.loads((adapter / 'adapter_config.json').read_text()).items()
                if v not in (None, False, [], {})
            }
            found[variant] = dict(
                config=config | {'base_model_name_or_path': None},
                shapes=shapes,
                shape=list(said.shape),
                answers=[round(x, 7) for x in said.flatten().tolist()],
            )
    STORED.write_text(json.dumps(found, separators=(',', ':')).replace('},"', '},\n"') + '\n')
