import json, sys, re, html
for c in json.load(open(sys.argv[1]))['cells']:
    for o in c.get('outputs', []):
        if o.get('name') == 'stdout': print('['+c['id']+']', ''.join(o['text'])[:1500])
        t = o.get('data', {}).get('text/html')
        if t:
            t = ''.join(t)
            if '<table' in t:
                rows = re.findall(r'<tr.*?</tr>', t, re.S)
                print('['+c['id']+'] table')
                for r in rows: print(' | '.join(html.unescape(re.sub(r'<.*?>', '', x)).strip() for x in re.findall(r'<t[hd].*?</t[hd]>', r, re.S)))
        elif 'text/plain' in o.get('data', {}) and 'image/png' not in o['data']: print('['+c['id']+']', ''.join(o['data']['text/plain'])[:600])
