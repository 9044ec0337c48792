"""Everything that takes a device, once on the processor and once on the pretend device; prints one line of
JSON a job.

A program of its own, since the pretend device changes PyTorch for the whole process: `test_device.py` runs it
and reads what it prints.
"""
import pretend_device  # before anything else
import json
from copy import deepcopy
from dataclasses import fields, is_dataclass

import torch
from torch import nn

import fusionbook.method
from fusionbook.bench.run import fusion
from fusionbook.core.errors import FusionError
from fusionbook.data import mini8
from fusionbook.method.base import BaseAlgorithm, fuse
from fusionbook.method.check import ToyPool, ToyTasks, toy_data_pool
from fusionbook.metrics.suite import Subject, groups_of, measure_group, metric_names
from fusionbook.modelpool import CLIPVisionModelPool
from fusionbook.taskpool import CLIPVisionModelTaskPool

TASKS = 'digits', 'shapes'
MODELS = {'_pretrained_': 'mini8/pretrained'} | {t: f'mini8/{t}' for t in TASKS}


def methods():
    "Every method with a `device`, and how it is built: few steps, small batches."
    small = dict(
        max_steps=2,
        max_adamerging_steps=2,
        steps=2,
        batch_size=8,
        max_iters=2,
        ada_iters=2,
        dataset_size=8,
        surgery_steps=2,
        gossip_max_steps=2,
        num_steps=2,
    )
    for name in dir(fusionbook.method):
        cls = getattr(fusionbook.method, name)
        if not (
            isinstance(cls, type)
            and issubclass(cls, BaseAlgorithm)
            and is_dataclass(cls)
            and cls.config_names
        ):
            continue
        keys = {f.name for f in fields(cls)} - {*getattr(cls, 'unused', ())}
        if 'device' in keys:
            yield name, cls, {k: v for k, v in small.items() if k in keys} | BLOCKS.get(name, {})


# methods of the repeated blocks of a network, and what makes them learn from plain numbers
BLOCKS = {'LayerWiseAdaMergingForLlamaSFT': dict(objective='entropy', start_layer_idx=0)}


def blocks_pool(count):
    "Networks of two numbered layers."
    torch.manual_seed(0)
    nets = {
        n: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        for n in ['_pretrained_', *map(str, range(count))]
    }
    held = {str(i): torch.randn(16, 6) for i in range(count)}
    return ToyPool(
        {n: net for n, net in nets.items() if n != '_pretrained_'}, nets['_pretrained_'], train_datasets=held
    ).attach(ToyTasks())


def fused(method):
    "The merge of as many experts as the method takes: three, two or one."
    pool = blocks_pool if type(method).__name__ in BLOCKS else toy_data_pool
    for count in (3, 2, 1):
        try: return fuse(method, pool(count))
        except FusionError as e:
            if count == 1 or 'expert' not in str(e): raise


def merged(cls, options, device):
    model = fused(cls(device=device, **options))
    if isinstance(model, dict): model = model['steps'][-1] # a continual method's last
    return {k: v.detach().cpu().double() for k, v in model.state_dict().items()}


def rows(method, device):
    "Accuracies and losses of a run whose networks are evaluated on the device."
    tests = {
        t: {'dataset': mini8.load(t, 'test').select(slice(0, 24)), 'templates': [mini8.TEMPLATE]}
        for t in TASKS
    }
    held = {t: mini8.load(t, 'validation').select(slice(0, 24)) for t in TASKS}
    pool = CLIPVisionModelPool(MODELS, val_datasets=held, train_datasets=held)
    report = fusion(method, pool, CLIPVisionModelTaskPool(tests, 'mini8/clip'), device=device)
    return {
        f'{r["model"]} {r["task"]} {r["metric"]}': torch.tensor(r['value']).double() for r in report['rows']
    }


RUNS = {
    'weights by the input': lambda device: fusionbook.method.DataAdaptiveWeightEnsemblingForCLIP(
        max_steps=1, device=device
    ),
    'task arithmetic': lambda device: fusionbook.method.TaskArithmetic(device=device),
    'ensemble of features': lambda device: fusionbook.method.SimpleEnsemble(),
    'ensemble of probabilities': lambda device: fusionbook.method.SimpleEnsemble(quantity='probabilities'),
    'maximum of members': lambda device: fusionbook.method.MaxModelPredictor(),
    'AdaMerging': lambda device: fusionbook.method.CLIPLayerWiseAdaMerging(
        max_steps=2, batch_size=4, device=device
    ),
    'a network that switches by task': lambda device: fusionbook.method.EMRMerging(device=device),
    'experts of low rank': lambda device: fusionbook.method.SmileUpscaling(device=device),
    'gates that learn': lambda device: fusionbook.method.CLIPWeightEnsemblingMoE(
        max_steps=1, batch_size=4, device=device
    ),
    'a router by features': lambda device: fusionbook.method.TwinMerging(samples=8, device=device),
    'whole experts': lambda device: fusionbook.method.ExpertRouting(rule='gate', samples=8),
    'preferences': lambda device: fusionbook.method.PWEMoExactParetoOptimalForCLIP(
        num_steps=2, dataloader_kwargs=dict(batch_size=4), device=device
    ),
    'neurons by activations': lambda device: fusionbook.method.GitRebasin(
        costs='activations', samples=8, batch_size=4, device=device
    ),
    'neurons by the midpoint': lambda device: fusionbook.method.GitRebasin(
        costs='ste', steps=2, samples=8, batch_size=4, device=device
    ),
    'channels reset': lambda device: fusionbook.method.Repair(samples=8, batch_size=4, device=device),
    'transport by activations': lambda device: fusionbook.method.GeometricFusion(
        costs='activations', samples=8, batch_size=4, device=device
    ),
}


def subject(device):
    "A small network, its parents and its data, for the metrics."
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
    initial = {k: v.to(device) for k, v in deepcopy(nets[0]).state_dict().items()}
    x, y = torch.randn(48, 6), torch.randint(0, 3, (48,))
    nets = [net.eval().to(device) for net in nets]
    data = x.to(device), y.to(device)
    return Subject(nets[0], initial, data, data, budget=.05, batch_size=24, parent=lambda i: nets[i])


# products with a Hessian are derivatives in forward mode, which tensors that only claim a device can not show
UNSEEN = 'hessian_top_eigenvalue', 'hessian_trace', 'hessian_top_full', 'hessian_trace_full'


def values(group, device):
    "The metrics of one group."
    return {
        r['metric']: torch.tensor(float(r['value'])).double() for r in measure_group(subject(device), group)
    }


def compared(name, compute):
    "One line: equal, or the largest difference, or the error of the device."
    expected = compute('cpu')
    try:
        got = compute(pretend_device.NAME)
    except Exception as e:
        return print(json.dumps(dict(job=name, error=f'{type(e).__name__}: {e}')), flush=True)
    gap = max(
        float((got[k] - expected[k]).abs().nan_to_num().max() / (1 + expected[k].abs().max()))
        for k in expected
        if expected[k].numel()
    )
    print(json.dumps(dict(job=name, gap=gap, names=sorted(got) == sorted(expected))), flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name, cls, options in methods():
        compared(f'method {name}', lambda device: merged(cls, options, device))
    for name, make in RUNS.items(): compared(f'run with {name}', lambda device: rows(make(device), device))
    for group in (g for g in groups_of(metric_names(['all'])) if g not in UNSEEN):
        compared(f'metric {group}', lambda device: values(group, device))
