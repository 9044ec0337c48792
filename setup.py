"Everything comes from settings.ini; extras are its `<name>_requirements`, the method registry is the nbdev module index."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def split(key): return cfg.get(key, '').split()

def data(*folders):
    "Package data below `folders`, as paths relative to the package."
    package = here/cfg['lib_path']
    return [str(p.relative_to(package)) for f in folders for p in (package/f).rglob('*') if p.is_file()]

class WithBoards(build_py):
    "The digests of boards lie beside the notebooks; an installed package carries a copy."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        target = Path(self.build_lib)/cfg['lib_path']/'board'
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((here/'nbs'/'board').glob('*.json')): (target/file.name).write_bytes(file.read_bytes())

readme = here/'README.md'
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'], license='Apache-2.0',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']},<{cfg['max_python']}",
    install_requires=split('requirements'),
    extras_require={k.removesuffix('_requirements'): split(k) for k in cfg if k.endswith('_requirements')},
    cmdclass=dict(build_py=WithBoards),
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    package_data={cfg['lib_name']: ['py.typed', *data('config', 'weights')]}, zip_safe=False,
    entry_points={'console_scripts': split('console_scripts'),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: 3.{v}' for v in (11, 12, 13))])
