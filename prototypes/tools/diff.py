import json, subprocess, sys
old = json.loads(subprocess.run(['git','show',f'{sys.argv[2]}:{sys.argv[1]}'],capture_output=True,text=True).stdout)
new = json.load(open(sys.argv[1])); o={n['name']:n for n in old['numbers']}; k=0
print(sys.argv[1], old.get('seconds'), new.get('seconds'), new.get('device'))
for n in new['numbers']:
    m=o.pop(n['name'],None)
    if m is None: print('  new', n['name'], n['value'], n['low'], n['high']); continue
    f=lambda e: tuple(None if e[x] is None else round(e[x],2) for x in ('value','low','high'))
    if f(m)!=f(n): k+=1; print('  ',n['name'],f(m),'->',f(n)) if k<60 else None
print('  changed',k,'gone',list(o))
