"""Build every page without Quarto: nbdev processes the notebooks, nbconvert makes HTML, sidebar and links are
compared with the files.

`-o DIR` keeps the pages: open DIR/index.html. They need no network: formulas are MathML, pictures lie in the
pages. `-s` (`--same`) takes nbdev's last result as it is.
"""
import argparse, json, re, tempfile
from functools import cache
from html import escape, unescape
from pathlib import Path
from posixpath import relpath
from urllib.parse import unquote
from book import nbs, notebooks, root, finish

STYLE = '''
body { margin: 0; font: 16px/1.55 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; color: #222; display: flex; }
nav { flex: 0 0 16rem; height: 100vh; overflow-y: auto; position: sticky; top: 0; padding: 1rem; box-sizing: border-box; background: #f6f6f4; font-size: .85rem; }
nav a, footer a { color: #335; text-decoration: none; } nav a.here { font-weight: bold; } nav summary { margin-top: .5rem; cursor: pointer; } nav a { display: block; padding: .05rem .8rem; }
main { flex: 1; min-width: 0; max-width: 58rem; padding: 1rem 2.5rem 4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .5rem .7rem; font-size: .82rem; line-height: 1.4; margin: .3rem 0; }
code, pre { font-family: ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace; } table { border-collapse: collapse; } td, th { padding: .1rem .6rem; border-bottom: 1px solid #ddd; }
img { max-width: 100%; } .lead { color: #555; font-size: 1.15rem; } .formula { overflow-x: auto; text-align: center; margin: .8rem 0; } .prompt, .anchor-link { display: none; }
footer { display: flex; justify-content: space-between; margin-top: 3rem; border-top: 1px solid #ddd; padding-top: .6rem; }
@media (max-width: 50rem) { body { display: block; } nav { position: static; height: auto; max-height: 30vh; } }
'''

def entries(node):
    "Every path and glob in the sidebar or navbar."
    if isinstance(node, str): yield node
    if isinstance(node, list):
        for n in node: yield from entries(n)
    if isinstance(node, dict):
        for key in 'contents', 'href', 'left', 'right': yield from entries(node.get(key))

def sidebar(quarto):
    "Sidebar entries without a file, and notebooks without an entry."
    listed = set()
    for entry in entries([quarto['website']['sidebar'], quarto['website'].get('navbar', {})]):
        if re.match(r'https?:', entry): continue
        found = list(root.glob(entry)) if '*' in entry else [root/entry] if (root/entry).exists() else []
        if not found and '*' not in entry: yield f'_quarto.yml: no file for `{entry}`'
        listed |= set(found)
    css = quarto['format']['html'].get('css', [])
    yield from (
        f'_quarto.yml: no file for `{c}`'
        for c in ([css] if isinstance(css, str) else css)
        if not (root / c).exists()
    )
    yield from (
        f'{nb.relative_to(root)} is not in the sidebar' for nb in notebooks(reports=True) if nb not in listed
    )

def links(nb, html):
    "Local links and pictures of a page that lead nowhere."
    for target in set(re.findall(r'<(?:a|img)\b[^>]*?\s(?:href|src)="([^"]+)"', html)):
        path = unquote(unescape(target)).partition('#')[0].partition('?')[0]
        if not path or re.match(r'[a-zA-Z][\w+.-]*:|//', path): continue
        base = root if path.startswith('/') else nb.parent
        full = base/path.lstrip('/')
        if not (full.exists() or full.with_suffix('.ipynb').exists()):
            yield f'{nb.relative_to(root)}: no file for the link `{target}`'

@cache
def page_of(nb): return nb.relative_to(nbs).with_suffix('.html').as_posix()

def parts(quarto):
    "The sidebar: (section or None, notebooks)."
    for node in quarto['website']['sidebar']['contents']:
        found = [f for e in entries(node) for f in (sorted(root.glob(e)) if '*' in e else [root/e])]
        yield (
            (node.get('section') if isinstance(node, dict) else None),
            [f for f in found if f.suffix == '.ipynb' and f.exists() and not f.name.startswith('_')],
        )

class Book:
    "What all pages share: settings, titles, sidebar, the names of pages, and what makes HTML of a notebook."
    def __init__(self):
        import yaml
        self.quarto = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
        self.titles = {n: title_of(n) for n in notebooks(reports=True)}
        self.parts, self.made, self.exporter = (
            list(parts(self.quarto)),
            {page_of(n) for n in self.titles},
            exporter(),
        )

def title_of(nb):
    first = ''.join(json.loads(nb.read_text(encoding='utf-8'))['cells'][0]['source'])
    return first.partition('\n')[0].removeprefix('# ').strip()

def exporter():
    """nbconvert's HTML without a second reading of each page, which costs three quarters of the time: our own
    code needs no sanitizer, and `tidy` does the rest."""
    from nbconvert import HTMLExporter, TemplateExporter
    from nbconvert.exporters.html import Highlight2HTML, WidgetsDataTypeFilter
    class Plain(HTMLExporter):
        def from_notebook_node(self, nb, resources=None, **kw):
            resources = self._init_resources(resources)
            self.register_filter('clean_html', lambda text: text)
            self.register_filter('highlight_code', Highlight2HTML(pygments_lexer='ipython3', parent=self))
            self.register_filter(
                'filter_data_type',
                WidgetsDataTypeFilter(notebook_metadata=self._nb_metadata, parent=self, resources=resources),
            )
            return TemplateExporter.from_notebook_node(self, nb, resources, **kw)
    return Plain(template_name='basic')

def tidy(html):
    "Pictures with a text for those who do not see them, attributes in double quotes."
    def tag(m):
        found = re.sub(r"""(?<=[\s"'])([\w:-]+)='([^'"]*)'""", r'\1="\2"', m[0])
        return (
            re.sub(r'/?>$', ' alt="No description has been provided for this image"/>', found)
            if found.startswith('<img') and ' alt=' not in found
            else found
        )
    return re.sub(r'<[a-zA-Z][^<>]*>', tag, html)

# commands that the converter has under another name
SAME = {r'\arg': r'\operatorname{arg}', r'\lVert': r'\|', r'\rVert': r'\|'}

def mathml(tex, **how):
    "One formula; a command that would stand on the page as it was typed is refused."
    from latex2mathml.converter import convert
    known = re.sub(r'\\(arg|lVert|rVert)(?![a-zA-Z])', lambda m: SAME[m[0]], tex)
    known = re.sub(r'\\[bB]igg?[lrm]?(?=\\[lr]angle)', '', known) # angles grow by themselves
    found = convert(known, **how)
    if left := re.search(r'\\[a-zA-Z]+', found):
        raise SystemExit(f'expected a formula without `{left[0]}`, got `{tex}`')
    return found

def formulas(html):
    "TeX between dollars as MathML, outside of code."
    def display(m): return f'<div class="formula">{mathml(unescape(m[1]).strip(), display="block")}</div>'
    def inline(m): return mathml(unescape(m[1]))
    out, inside = [], 0
    for piece in re.split(r'(<[^>]*>)', html):
        if m := re.match(r'<(/?)(pre|code|script|style|svg)\b', piece): inside += -1 if m[1] else 1
        if not inside and not piece.startswith('<'):
            piece = re.sub(r'\$\$(.+?)\$\$', display, piece, flags=re.S)
            piece = re.sub(r'(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?!\d)', inline, piece)
        out.append(piece)
    return ''.join(out)

def prepared(cell):
    "A cell of nbdev's page without what only Quarto reads."
    def plain(text): return re.sub(r'(?m)^:::.*$|(?<=\))\{[^}\n]*\}| \{#[^}\n]*\}$', '', text)
    if cell.cell_type == 'markdown': cell.source = plain(cell.source)
    if cell.cell_type != 'code': return cell
    directives = re.findall(r'(?m)^#\|\s*(.+?)\s*$', cell.source)
    cell.source = re.sub(r'(?m)^#\|.*\n?', '', cell.source)
    cell.metadata['folded'] = 'code-fold: true' in directives
    if 'output: false' in directives: cell.outputs = []
    cell.metadata['transient'] = dict(remove_source='echo: false' in directives or not cell.source.strip())
    for o in cell.outputs:
        if 'text/markdown' in (data := o.get('data', {})):
            data['text/markdown'] = re.sub(r'\A---\s+', '', plain(''.join(data['text/markdown'])))
    return cell

def joined(cells):
    "Folded cells that follow each other and make nothing, as one with the next."
    kept = []
    for c in cells:
        last = kept[-1] if kept else {}
        if last.get('metadata', {}).get('folded') and c.metadata.get('folded') and not last.outputs:
            c.source = f'{kept.pop().source}\n\n{c.source}'
        kept.append(c)
    return kept

def folded(cell):
    "A cell whose code is folded, as two: the code behind a summary, and what it made."
    from nbformat.v4 import new_markdown_cell
    hidden = cell.metadata.get('transient', {}).get('remove_source')
    if not cell.metadata.get('folded') or hidden: return [cell]
    code = new_markdown_cell(
        f'<details><summary>Code</summary>\n\n```python\n{cell.source}\n```\n\n</details>'
    )
    cell.source, cell.metadata['transient'] = '', dict(remove_source=True)
    return [code, cell]

def rewritten(html, nb, book):
    "Links between notebooks as links between pages; other files of the repository where they are published."
    here, made, web = page_of(nb), book.made, book.quarto['website']
    site, repo = web['site-url'], web['repo-url']
    def local(page, anchor): return relpath(page, str(Path(here).parent)) + (f'#{anchor}' if anchor else '')
    def link(m):
        path, _, anchor = unescape(m[2]).partition('#')
        if path.startswith(f'{site}/'):
            page = path.removeprefix(f'{site}/').removeprefix('nbs/')
            found = next((p for p in made if p == page), None) or next(
                (p for p in made if re.sub(r'(^|/)\w*?\d\w*?_', r'\1', p).endswith(page.rpartition('/')[2])),
                None,
            )
            return f'{m[1]}"{escape(local(found, anchor))}"' if found else m[0]
        if not path or re.match(r'[a-zA-Z][\w+.-]*:|//', path): return m[0]
        full = (nb.parent/unquote(path)).resolve()
        if (
            full.suffix in ('.ipynb', '.html')
            and full.is_relative_to(nbs)
            and (page := full.relative_to(nbs).with_suffix('.html').as_posix()) in made
        ):
            return f'{m[1]}"{escape(local(page, anchor))}"'
        return (
            f'{m[1]}"{repo}/blob/main/{full.relative_to(root).as_posix()}"'
            if full.exists() and full.is_relative_to(root)
            else m[0]
        )
    return re.sub(r'(<a\b[^>]*?\shref=)"([^"]+)"', link, html)

@cache
def relative(page, folder): return escape(relpath(page, folder))

def navigation(nb, book):
    "Sidebar, and the pages before and after this one."
    here, order, titles = str(Path(page_of(nb)).parent), [n for _, ns in book.parts for n in ns], book.titles
    def a(n, text, extra=''): return f'<a href="{relative(page_of(n), here)}"{extra}>{escape(text)}</a>'
    def section(name, ns):
        body = ''.join(a(n, titles[n], ' class="here"' if n == nb else '') for n in ns)
        first = nb.stem == 'index' and name in ('Tutorials', 'Reports')
        opened = ' open' if nb in ns or first else ''
        return (
            f'<details{opened}><summary>{escape(name)}</summary>{body}</details>'
            if name
            else body
        )
    at = order.index(nb) if nb in order else 0
    before, after = order[at - 1] if at else None, order[at + 1] if at + 1 < len(order) else None
    turn = (a(before, f'← {titles[before]}') if before else '<span></span>') + (
        a(after, f'{titles[after]} →') if after else ''
    )
    return ''.join(section(*p) for p in book.parts), turn

def page(nb, cache, book, style):
    "A whole page, and its body as it was before its links were rewritten."
    import nbformat, yaml
    doc = nbformat.read(str(cache/nb.relative_to(root)), 4)
    front = next(
        (yaml.safe_load(c.source.strip().strip('-')) or {} for c in doc.cells[:1] if c.cell_type == 'raw'), {}
    )
    shown = [c for c in doc.cells if c.cell_type != 'raw' and not c.source.startswith('<!-- WARNING')]
    doc.cells = [part for c in joined(map(prepared, shown)) for part in folded(c)]
    body = tidy(book.exporter.from_notebook_node(doc)[0])
    web = book.quarto['website']
    side, turn = navigation(nb, book)
    title, lead = str(front.get('title') or book.titles[nb]), str(front.get('description') or '')
    text = formulas(rewritten(body, nb, book))
    heading = '' if re.search(r'<h1\b', body) else f'<h1>{escape(title)}</h1>'
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)} – {escape(web["title"])}</title>'
        f'<style>{style}</style></head><body><nav>{side}</nav><main>{heading}<p class="lead">{formulas(escape(lead))}</p>\n{text}\n<footer>{turn}</footer></main></body></html>\n'
    ), body

@cache
def there(folder, path): return (folder/path).exists()   # pages of one folder share their sidebar

def broken(file, out):
    "What a kept page must not have: links to pages that are not there, raw front matter."
    html = file.read_text(encoding='utf-8')
    for target in set(re.findall(r'<a\b[^>]*?\shref="([^"]+)"', html)):
        path = unquote(unescape(target)).partition('#')[0].partition('?')[0]
        if path and not re.match(r'[a-zA-Z][\w+.-]*:|//', path) and not there(file.parent, path):
            yield f'{file.relative_to(out)}: no page for the link `{target}`'
    if re.search(r'<p>---|output-file:|<body>\s*---', html):
        yield f'{file.relative_to(out)}: raw front matter'

def main():
    from nbdev.serve import proc_nbs
    from pygments.formatters import HtmlFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument('-o', '--output', help='keep the pages in this folder')
    flags.add_argument('-s', '--same', action='store_true', help="take nbdev's last result")
    asked, book = flags.parse_args(), Book()
    bad, cache = list(sidebar(book.quarto)), root/'_proc'
    if not asked.same or not cache.is_dir(): cache = proc_nbs(root, n_workers=2, force=True)
    style = (
        STYLE
        + HtmlFormatter().get_style_defs('.highlight')
        + (nbs / 'styles.css').read_text(encoding='utf-8')
    )
    with tempfile.TemporaryDirectory() as spare:
        out = Path(asked.output or spare)
        for nb in book.titles:
            if not (cache / nb.relative_to(root)).exists():
                bad.append(f'{nb.relative_to(root)}: nbdev made no page')
                continue
            html, body = page(nb, cache, book, style)
            bad += links(nb, body)
            (out/page_of(nb)).parent.mkdir(parents=True, exist_ok=True)
            (out/page_of(nb)).write_text(html, encoding='utf-8')
        made = [out/page_of(nb) for nb in book.titles if (out/page_of(nb)).exists()]
        bad += [b for f in made for b in broken(f, out)]
        finish(
            bad,
            f'{len(made)} pages built, sidebar and links lead somewhere'
            + (f'; open {out / "index.html"}' if asked.output else ''),
        )

# a process of nbdev's: when it ends, each of its two hundred shells would collect garbage, which takes
# longer than the pages
if __name__ == '__mp_main__':
    from IPython.core.interactiveshell import InteractiveShell
    InteractiveShell.atexit_operations = lambda self: None

if __name__ == '__main__': main()
