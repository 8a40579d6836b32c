import base64, json, sys
nb, tag = sys.argv[1:3]
for i, c in enumerate(json.load(open(nb))['cells']):
    for j, o in enumerate(c.get('outputs', [])):
        d = o.get('data', {})
        if 'image/png' in d:
            p = f"{tag}-{c['id']}-{j}.png"; open(p, 'wb').write(base64.b64decode(d['image/png'])); print(p)
