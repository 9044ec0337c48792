"""A pretend accelerator, `pretend:0`, made of the processor: its numbers are the processor's, its rules are a
GPU's.

Import it before anything else; then `device='pretend'` works wherever `device='cuda'` would. Tensors say
`device=pretend:0`, an operation that mixes devices raises (a 0-d tensor of the processor may join),
`.numpy()` refuses, autograd and `nn.Module.to` work. So a machine without an accelerator proves that a path
is whole: no forgotten `.to(device)`, no result left on the device, the same numbers. It says nothing about
speed. It needs torch 2.13 or later: the interface behind it is an experiment of PyTorch's.
"""
import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'pretend'
MOVES = {'_to_copy', 'to', 'copy_', '_copy_from', '_copy_from_and_resize'}
SCALARS = {'_local_scalar_dense', 'item', 'equal', 'is_nonzero'}


class Backend:
    "What PyTorch asks of a device's module."
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    manual_seed = manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)
    synchronize = staticmethod(lambda device=None: None)


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)


class PretendTensor(torch.Tensor):
    "A tensor of the processor that claims to lie on the pretend device."
    @staticmethod
    def __new__(cls, real):
        like = dict(
            strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=DEVICE
        )
        made = torch.Tensor._make_wrapper_subclass(cls, real.size(), **like)
        made.real_tensor = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})

    def tolist(self): return self.real_tensor.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert pretend:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self): return f'pretend({self.real_tensor!r})'


def real(x): return x.real_tensor if isinstance(x, PretendTensor) else x


def check(op, name, tensors):
    "Refuse an operation on tensors of two devices, as a GPU does; indices may lie on the processor."
    here = [t for t in tensors if isinstance(t, PretendTensor)]
    if not here or name in MOVES or 'index' in name: return
    if any(t.dim() for t in tensors if not isinstance(t, PretendTensor)):
        raise RuntimeError(f'expected all tensors on one device, got {DEVICE} and cpu in {op}')


def copied(to, source):
    real(to).copy_(real(source))
    return to


def run(op, args, kwargs):
    "Run an operation on the processor; its results claim to lie where the operation ran."
    name = op._schema.name.split('::')[1]
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    check(op, name, tensors)
    if name == 'copy_': return copied(args[0], args[1])
    if name == '_copy_from': return copied(args[1], args[0])
    here = [t for t in tensors if isinstance(t, PretendTensor)]
    device = kwargs.get('device')
    if device is not None: kwargs = kwargs | {'device': 'cpu'}
    out = op(*tree_map(real, args), **tree_map(real, kwargs))
    stays = torch.device(device).type == NAME if device is not None else bool(here)
    if name in SCALARS or not stays: return out
    known = {id(real(t)): t for t in here}  # results in place keep their wrapper
    def wrapped(t):
        if not isinstance(t, torch.Tensor): return t
        return known[id(t)] if id(t) in known else PretendTensor(t)
    return tree_map(wrapped, out)


library = torch.library.Library('_', 'IMPL')
library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), dispatch_key='PrivateUse1')
plain_tensor = torch.tensor


def tensor(data, *args, device=None, **kwargs):
    made = plain_tensor(data, *args, **kwargs)
    return made if device is None or torch.device(device).type != NAME else made.to(device)


def inference_mode(mode=True):
    "Wrapped tensors count versions, which PyTorch's own mode does not allow."
    if mode is True: return torch.no_grad()
    return torch.enable_grad() if mode is False else torch.no_grad()(mode)


torch.tensor = tensor
torch.inference_mode = inference_mode
torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters, as on a GPU
