import glob, json
def edit(name, pairs):
    p = glob.glob(f'notebooks/{name}*.ipynb')[0]; raw = open(p).read(); d = json.loads(raw)
    for a, b in pairs:
        hit = [c for c in d['cells'] if c['cell_type'] == 'markdown' and a in ''.join(c['source'])]
        assert len(hit) == 1, (a, len(hit))
        s = ''.join(hit[0]['source']); assert s.count(a) == 1
        hit[0]['source'] = s.replace(a, b).splitlines(keepends=True)
    open(p, 'w').write(json.dumps(d, indent=1, ensure_ascii=False) + '\n')
