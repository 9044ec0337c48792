"""Every experiment notebook has exactly one cell tagged `parameters`, and it only assigns; without the tag
papermill silently changes nothing."""
import ast
from book import cells, finish, notebooks

def fault(nb):
    "What is wrong with the parameters of a notebook, or None."
    tagged = [c for c in cells(nb) if 'parameters' in c['metadata'].get('tags', ())]
    if len(tagged) != 1: return f'expected one cell tagged `parameters`, got {len(tagged)}'
    if not all(isinstance(b, (ast.Assign, ast.AnnAssign)) for b in ast.parse(tagged[0]['src']).body):
        return 'the `parameters` cell does more than assign'

experiments = [nb for nb in notebooks() if nb.parent.name == '90_experiments']
finish(
    [f'{nb.name}: {f}' for nb in experiments if (f := fault(nb))],
    f'{len(experiments)} experiments have their parameters',
)
