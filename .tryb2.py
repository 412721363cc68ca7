from importlib.machinery import SourceFileLoader
t=SourceFileLoader('t','.tryb.py').load_module()
t.go(128,64,1,4,1); t.go(64,96,1,4,2); t.go(64,128,1,3,1)
