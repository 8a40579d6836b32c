import json, sys
def dump(nb, out):
    d = json.load(open(nb)); s = ''
    for c in d['cells']:
        tags = ' '.join(c['metadata'].get('tags', []))
        s += f"#%%% {c['cell_type']} {c['id']} {tags}\n" + ''.join(c['source']).rstrip('\n') + '\n'
    open(out, 'w').write(s)
def load(f, nb):
    d = json.load(open(nb)); old = {c['id']: c for c in d['cells']}; cells = []
    parts = open(f).read().split('#%%% ')[1:]
    for p in parts:
        head, _, body = p.partition('\n'); kind, cid, *tags = head.split()
        c = old.get(cid, {'cell_type': kind, 'id': cid, 'metadata': {}, 'source': []})
        c['cell_type'] = kind; c['source'] = body.rstrip('\n').splitlines(keepends=True)
        if tags: c['metadata']['tags'] = tags
        else: c['metadata'].pop('tags', None)
        if kind == 'code': c['outputs'] = []; c['execution_count'] = None
        else: c.pop('outputs', None); c.pop('execution_count', None)
        cells.append(c)
    d['cells'] = cells
    open(nb, 'w').write(json.dumps(d, indent=1, ensure_ascii=False) + '\n')
{'dump': dump, 'load': load}[sys.argv[1]](*sys.argv[2:])
