from importlib.machinery import SourceFileLoader
t=SourceFileLoader('t','.tryb.py').load_module()
full=dict(TEXT=1,DILATED=1,MAP_SETS=3).items()
for e in ((),full):
    t.go(128,112,0,2,1,e); t.go(128,96,0,3,1,e); t.go(128,64,1,4,1,e); t.go(64,128,0,3,2,e); t.go(64,96,1,4,2,e); t.go(64,80,1,4,2,e); t.go(96,96,0,3,1,e); t.go(96,64,1,4,1,e); t.go(32,128,0,4,2,e); t.go(32,96,1,4,2,e); t.go(256,48,0,2,1,e)
