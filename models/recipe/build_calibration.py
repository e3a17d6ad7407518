#!/usr/bin/env python3
"""Builds data/calibration.jsonl: what the escalation policy is fitted on (`tandem lab calibrate`).

  python3 recipe/build_calibration.py            # in models/; needs only the standard library
  python3 recipe/build_calibration.py --check    # says whether the file is what this script makes

Three parts, none of which shares a prompt or a problem with eval_*.jsonl:
  fresh   problems from the generators of build_data.py whose keys hash to neither the training nor
          the evaluation split (`hsplit` == 'hidden'): no model has seen them, no evaluation uses them;
  device  device dialogues whose slot values hash to that same split;
  train   rows the models were trained on: problems, facts, dialogues (the only facts there are).
The generators are taken from build_data.py's source, so that they cannot drift apart; the word and
city lists that it reads from WordNet and GeoNames are read back from the training rows."""
import argparse, ast, collections, gzip, hashlib, json, os, random, re, sys

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, '..', 'data')
OUT = os.path.join(DATA, 'calibration.jsonl')
SEED = 20250611
# Rows per category; where a category has too few keys, each of them in up to WORDINGS wordings.
FRESH = dict(add=1600, sub=1600, mul=1000, date=1100, sort=1600, string=1400, compare=1400, convert=150)
WORDINGS = 4
DEVICE = 1200
TRAIN_PROBLEMS, TRAIN_FACTS, TRAIN_DIALOGUES = 75, 60, 25      # per category
FACTS = 'definition kind_of antonym capital capital_of continent currency language city element example unit'.split()
DIALOGUES = 'timer alarm climate home music nav reminder list message smalltalk followup'.split()
# What is taken from build_data.py.
NAMES = '''hsplit BLOCK clean MON MD DOW NUMW pick add_work sub_work g_add g_sub g_mul CV g_conv g_date g_sort g_string g_compare
ROOMS COLORS NAMES TASKS ITEMS GENRE PLACES MSGS ampm J POL polite g_dialog fx CHAT'''.split()


def generators(short, words, cities):
    """The functions and tables of build_data.py, without running the rest of it."""
    tree = ast.parse(open(os.path.join(HERE, 'build_data.py'), encoding='utf8').read())
    def name(node):
        if isinstance(node, ast.FunctionDef): return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name): return node.targets[0].id
    tree.body = [n for n in tree.body if name(n) in NAMES]
    missing = set(NAMES) - {name(n) for n in tree.body}
    assert not missing, f'build_data.py no longer defines {missing}'
    # No countries: follow-up questions come from the training rows.
    g = dict(random=random, re=re, hashlib=hashlib, json=json, SW=words, SHORT=short, citylist=cities, sov=[], capname={}, FACTD={})
    exec(compile(tree, 'build_data.py', 'exec'), g)
    return g


def normal(prompt):
    """Equal for prompts that differ only in case and end mark, as build_data.py's `noisy` makes them."""
    return prompt.lower().rstrip(' .?!')


def build():
    train = [json.loads(l) for l in gzip.open(os.path.join(DATA, 'train.jsonl.gz'), 'rt', encoding='utf8')]
    held = [json.loads(l) for f in sorted(os.listdir(DATA)) if re.fullmatch(r'eval_\w+\.jsonl', f) for l in open(os.path.join(DATA, f), encoding='utf8')]
    held_prompts = {normal(x['prompt']) for x in held}
    held_facts = {x['answer'] for x in held if x['category'] in FACTS}
    held_problems = {x['answer'] for x in held if x['category'] in ('add', 'sub', 'mul', 'convert', 'date', 'sort')}

    lists = [re.search(r': ([a-z, ]+)\.', x['answer']) for x in train if x['category'] in ('sort', 'string')]
    short = sorted({w for m in lists if m for w in m[1].split(', ') if re.fullmatch('[a-z]{3,6}', w)})
    spelt = {m[1] for x in train if x['category'] == 'string' for m in [re.match('([a-z]+) is spelled', x['answer'])] if m}
    words = sorted(set(short) | spelt)
    routes = [re.search(r'"action":"nav.route","to":"([^"]+)"', x['answer']) for x in train if x['category'] == 'nav']
    cities = sorted({m[1] for m in routes if m})
    g = generators(short, words, cities)
    r = random.Random(SEED)
    rows, seen = [], set()

    def take(part, category, prompt, answer, key):
        if normal(prompt) in held_prompts or normal(prompt) in seen: return False
        seen.add(normal(prompt))
        row = dict(prompt=prompt, answer=answer, category=category, part=part)
        # Wordings of one problem share the key; elsewhere the answer says as much.
        rows.append(dict(row, key=key) if part == 'fresh' else row)
        return True

    # Fresh problems. Tries are bounded: some categories have few keys in the split.
    gens = dict(add='g_add', sub='g_sub', mul='g_mul', convert='g_conv', date='g_date', sort='g_sort', string='g_string', compare='g_compare')
    for category, wanted in FRESH.items():
        used, spare, n = collections.Counter(), [], 0
        for _ in range(wanted * 400):
            if n >= wanted: break
            c, key, q, a, _ = g[gens[category]](r)
            if c != category or key.endswith('train') or g['hsplit'](key) != 'hidden': continue
            if used[key]: spare.append((q, a, key)); spare = spare[-4000:]; continue
            if take('fresh', c, q, a, key): used[key] += 1; n += 1
        for q, a, key in spare:
            if n >= wanted: break
            if used[key] < WORDINGS and take('fresh', category, q, a, key): used[key] += 1; n += 1

    n = 0
    while n < DEVICE:
        try: c, q, a = g['g_dialog'](r)
        except IndexError: continue      # a follow-up question
        if c in ('smalltalk', 'followup') or '{' not in a or g['hsplit']('dlg' + a) != 'hidden': continue
        n += take('device', c, q, a, a)

    r.shuffle(train)
    count = collections.Counter()
    for x in train:
        c, a = x['category'], x['answer']
        most = TRAIN_PROBLEMS if c in FRESH else TRAIN_FACTS if c in FACTS else TRAIN_DIALOGUES if c in DIALOGUES else 0
        if count[c] >= most or a in held_facts or a in held_problems: continue
        count[c] += take('train', c, x['prompt'], a, x['key'])

    # What is promised above.
    assert not {normal(x['prompt']) for x in rows} & held_prompts
    assert not {x['answer'] for x in rows} & (held_facts | held_problems)
    assert len({normal(x['prompt']) for x in rows}) == len(rows)
    trained = {normal(x['prompt']) for x in train}
    assert not [x for x in rows if x['part'] == 'fresh' and normal(x['prompt']) in trained]
    r.shuffle(rows)
    return rows


def main():
    p = argparse.ArgumentParser(description='Builds data/calibration.jsonl.')
    p.add_argument('--check', action='store_true', help='compare with the file instead of writing it')
    a = p.parse_args()
    rows = build()
    text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in rows)
    if a.check:
        same = open(OUT, encoding='utf8').read() == text
        print('calibration.jsonl', 'is up to date' if same else 'differs from what this script makes')
        sys.exit(not same)
    with open(OUT, 'w', encoding='utf8') as f: f.write(text)
    for part in ('fresh', 'device', 'train'):
        c = collections.Counter(x['category'] for x in rows if x['part'] == part)
        print(f'{part:7s}{sum(c.values()):5d}', dict(sorted(c.items())))
    print(f'{len(rows)} rows, {len(text)} bytes')


if __name__ == '__main__':
    main()
