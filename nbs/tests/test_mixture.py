"""Mixtures of dense models as a user has them: files of mergekit-moe and lines of ours, tokenizers, fresh
processes, kills, every bad input."""
import json, shutil

import pytest
import torch
from safetensors.torch import load_file

import fusionbook
import warm
from conftest import run_program
from fusionbook.core.errors import FusionError
from test_merge_command import made

ANSWER = """
import sys, torch, fusionbook
words = torch.arange(6)[None] + 3
for folder in sys.argv[2:]:
    if sys.argv[1] == 'ours': network = fusionbook.open_model(folder)
    else:
        from transformers import AutoModelForCausalLM
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode(): torch.save(network(words).logits, f'{folder}.{sys.argv[1]}.pt')
"""


def elsewhere(who, *folders):
    "Logits of models, in a process that knows nothing of this one."
    warm.run(who, *folders, code=ANSWER, cwd=folders[0].parent, check=True)
    return [torch.load(f'{f}.{who}.pt') for f in folders]


def with_words(folder, count=40, step=1):
    "A tokenizer of single words beside a model; another step numbers them in another order."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f'w{i}': i * step % count for i in range(count)}, unk_token='w0'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token='w0', bos_token='w1', pad_token='w2'
    ).save_pretrained(folder)


DENSE = 'llama', 'llama_tied', 'mistral', 'qwen2', 'qwen3'


@pytest.fixture(scope='module')
def upscaled(tmp_path_factory):
    """Kind -> logits of a dense model, and of its up-scaled copy as plain transformers and as we open it: a
    process for each of the two."""
    room, wanted, folders = tmp_path_factory.mktemp('upscaled'), [], []
    for kind in DENSE:
        (network,), inputs, (place,) = made(kind, room/kind, 1)
        folders.append(
            fusionbook.merge(
                method='mixtral_moe_upscaling', base=place, num_experts=3, out=room / kind / 'out'
            )
        )
        with torch.inference_mode(): wanted.append(network(**inputs).logits)
    return dict(
        zip(
            DENSE,
            zip(wanted, elsewhere('theirs', *folders), elsewhere('ours', *folders), strict=True),
            strict=True,
        )
    )


@pytest.mark.parametrize('kind', DENSE)
def test_copies_answer_as_the_model(kind, upscaled):
    """An up-scaled model opens in plain transformers, in a process of its own, with the answers of the dense
    one."""
    want, theirs, ours = upscaled[kind]
    # shares of equal answers: four roundings of numbers below one half
    assert torch.allclose(theirs, want, rtol=0, atol=2 ** -22)
    assert ours.equal(theirs)


def test_a_file_of_mergekit(tmp_path):
    "Prompts as texts, the tokenizer of the base, gates by hand; the tokenizer lies beside the result."
    networks, inputs, (base, a, b) = made('mistral', tmp_path)
    for place in (base, a, b): with_words(place)
    file = tmp_path/'moe.yml'
    file.write_text(f'''base_model: {base}
gate_mode: hidden
dtype: float32
experts:
  - source_model: {a}
    positive_prompts: ["w5 w6", "w7"]
    negative_prompts: ["w9"]
  - source_model: {b}
    positive_prompts:
      - w8 w9 w4
''')
    done = run_program('merge', 'moe.yml', 'out', cwd=tmp_path)
    assert done.status == 0, done.err
    assert 'MixtralForCausalLM' in done.out and {'tokenizer.json', 'config.json'} <= {
        f.name for f in (tmp_path / 'out').iterdir()
    }
    def state(*ids):
        with torch.no_grad():
            return torch.stack(
                networks[0](torch.tensor([[1, *ids]]), output_hidden_states=True).hidden_states[:-1]
            )[:, 0, -1]
    first = (state(5, 6) + state(7)) / 2 - state(9)
    found = load_file(tmp_path/'out'/'model.safetensors')
    for i in range(2):
        gate = found[f'model.layers.{i}.block_sparse_moe.gate.weight']
        assert torch.allclose(gate[0], first[i] / first[i].norm(), atol=1e-5)
        assert torch.allclose(gate[1], state(8, 9, 4)[i] / state(8, 9, 4)[i].norm(), atol=1e-5)
        assert found[f'model.layers.{i}.block_sparse_moe.experts.1.w2.weight'].equal(
            networks[2].state_dict()[f'model.layers.{i}.mlp.down_proj.weight']
        )
    dry = run_program('merge', 'moe.yml', '--dry-run', cwd=tmp_path)
    assert dry.status == 0 and 'of which a token uses' in dry.out


def test_a_run_of_the_method(tmp_path):
    """`fusionbook method=mixtral_moe_merging` on a pool of folders: saved with its recipe, the same bytes of
    logits in a fresh process."""
    networks, inputs, places = made('llama', tmp_path)
    models = ', '.join(f'{n}: {p}' for n, p in zip(('_pretrained_', 'a', 'b'), places, strict=True))
    done = run_program(
        'method=mixtral_moe_merging',
        'method.experts_per_token=1',
        'modelpool=CausalLMPool/mixtral_moe_merging',
        'modelpool.models={' + models + '}',
        '++modelpool.tokenizer=null',
        'merged_model_save_path=out',
        cwd=tmp_path,
    )
    assert done.status == 0, done.err
    names = {f.name for f in (tmp_path/'out').iterdir()}
    assert {'config.json', 'fusionbook.json', 'model.safetensors'} <= names
    (ours,), (theirs,) = (elsewhere(who, tmp_path/'out') for who in ('ours', 'theirs'))
    here = fusionbook.open_model(tmp_path/'out')
    with torch.inference_mode(): assert here(**inputs).logits.equal(ours)
    assert ours.equal(theirs) # one network, opened in two ways


def test_goes_on_after_a_kill(tmp_path, monkeypatch):
    """A write that was stopped twice goes on both times, writes no tensor anew, and gives the bytes of one
    that was not."""
    _, _, (base, a, b) = made('llama', tmp_path)
    keys = dict(method='mixtral_moe_merging', base=base, models=[a, b])
    from fusionbook.core import resumable
    put, written = resumable._put, []
    def merged(out, limit=None):
        "Names that are written until as many are."
        written.clear()
        def noted(f, sd, name, *more):
            if len(written) == limit: raise KeyboardInterrupt
            written.append(name)
            return put(f, sd, name, *more)
        monkeypatch.setattr(resumable, '_put', noted)
        try: fusionbook.merge(**keys, out=out)
        finally: monkeypatch.setattr(resumable, '_put', put)
        return list(written)
    every, kills, parts = merged(tmp_path/'whole'), 0, []
    assert len(every) > 20
    for count in (9, 7):
        with pytest.raises(KeyboardInterrupt): merged(tmp_path/'out', count)
        kills, parts = kills + 1, parts + [list(written)]
        assert len(written) == count and not (tmp_path/'out').exists()
    parts.append(merged(tmp_path/'out'))
    assert kills == 2 and sum(parts, []) == every
    whole, out = ((tmp_path/n/'model.safetensors').read_bytes() for n in ('whole', 'out'))
    assert out == whole


def test_bad_input(tmp_path):
    _, _, (base, a, b) = made('llama', tmp_path)
    _, _, (other,) = made('qwen2', tmp_path/'q', 1)
    with_words(base)
    with_words(a)
    with_words(b, 39) # a word less contradicts nothing
    shuffled = tmp_path/'shuffled'
    shutil.copytree(b, shuffled)
    with_words(shuffled, 40, 3)

    def experts(*models, **more):
        return [dict(source_model=m, positive_prompts=[f'w{3 + i}'], **more) for i, m in enumerate(models)]
    cases = {
        'got llama and qwen2': dict(base_model=base, experts=experts(a, other)),
        '2 times: they answer alike': dict(base_model=base, experts=experts(a, a)),
        'from 1 to 1': dict(base_model=base, experts=experts(a)),
        'one of hidden, hidden_last': dict(base_model=base, gate_mode='magic', experts=experts(a, base)),
        'did you mean `experts_per_token`': dict(
            base_model=base, experts=experts(a, base), expert_per_token=1
        ),
        '`positive_prompts` for each expert': dict(base_model=base, experts=[a, base]),
        'does not exist': dict(base_model=str(tmp_path / 'none'), experts=experts(a, base)),
        (
            'to number words as the base does, got `w27` in row 27 and in row 1 in the two files '
            '`tokenizer.json`; rows of other words would be mixed'
        ): dict(
            base_model=base, experts=experts(a, str(shuffled))
        ),
        'KORMo': dict(base_model=base, experts=experts(a, base), architecture='kormo'),
    }
    for says, keys in cases.items():
        with pytest.raises(FusionError) as caught: fusionbook.merge(keys, out=tmp_path/'out')
        assert says in str(caught.value) and '\n' not in str(caught.value), caught.value
    good = dict(base_model=base, gate_mode='random', experts=[a, b])
    assert fusionbook.merge(good, dry_run=True) is None
    options = {
        'within `max_memory` of 1,000 bytes': dict(max_memory='1kB'),
        'a device of this machine, got `cuda:63`': dict(device='cuda:63'),
    }
    for says, option in options.items():
        with pytest.raises(FusionError, match=says): fusionbook.merge(good, out=tmp_path/'out', **option)
    with pytest.raises(FusionError, match='apart from its sources'): fusionbook.merge(good, out=f'{a}/inside')
    assert not (tmp_path/'out').exists()
    bad = run_program('merge', 'moe.yml', 'out', '--load-in-4bit', cwd=tmp_path)
    assert bad.status and 'load-in-4bit' in bad.err and len(bad.err.strip().splitlines()) == 1


KEPT = {
    'ExpertRouting': dict(rule='gate'),
    'TwinMerging': dict(rank=2),
    'DataAdaptiveWeightEnsemblingForCLIP': dict(max_steps=2, lr=.01),
    'PWEMoELinearScalarizationForCLIP': dict(num_steps=3, lr=.01),
    'PWEMoEExactParetoOptimalForOpenCLIP': dict(num_steps=3),
}
OPEN = """
import sys, torch, fusionbook
x = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    with torch.inference_mode(): torch.save(fusionbook.open_model(folder)(x), f'{folder}.pt')
"""


def test_saved_and_opened_elsewhere(tmp_path):
    """Networks with gates that were fitted or learned: the same bytes of logits in a process of its own; a
    folder without its recipe, or with another's tensors, is refused."""
    import fusionbook.method
    from fusionbook.method.base import fuse
    from fusionbook.method.check import toy_data_pool
    x, want = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), {}
    for name, settings in KEPT.items():
        pool = toy_data_pool()
        net = fuse(getattr(fusionbook.method, name)(**settings), pool)
        pool.save_model(net, tmp_path/name, built=True)
        with torch.inference_mode(): want[name] = net(x)
    torch.save(x, tmp_path/'x.pt')
    folders = [str(tmp_path/n) for n in KEPT]
    warm.run(tmp_path/'x.pt', *folders, code=OPEN, cwd=tmp_path, check=True)
    for name in KEPT: assert torch.load(f'{tmp_path/name}.pt').equal(want[name]), name
    first, second = tmp_path/'TwinMerging', tmp_path/'ExpertRouting'
    (first/'model.safetensors').write_bytes((second/'model.safetensors').read_bytes())
    with pytest.raises(FusionError, match='expected in .* the tensors of its TwinNetwork, got tensors that'):
        fusionbook.open_model(first)
    (second/'fusionbook.json').unlink()
    (second/'config.json').unlink(missing_ok=True)
    with pytest.raises(FusionError, match='`fusionbook.json` or `config.json`'): fusionbook.open_model(second)
    told = json.loads((tmp_path / 'PWEMoELinearScalarizationForCLIP' / 'fusionbook.json').read_text()) | dict(
        format=9
    )
    (tmp_path/'PWEMoELinearScalarizationForCLIP'/'fusionbook.json').write_text(json.dumps(told))
    with pytest.raises(FusionError, match='another version of fusionbook'):
        fusionbook.open_model(tmp_path / 'PWEMoELinearScalarizationForCLIP')
