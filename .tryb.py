import sys
sys.path.insert(0,'.')
from gna_flex.cuda import jit
from gna_flex.cuda.kernel import Config
from dataclasses import dataclass
def go(d,keys,rak,stages,rs,extra=()):
    c=Config(d,keys)
    src=(jit.source_folder()/'hopper'/'backward.cu').read_text()
    de=c.defines()|{"ROWS_ARE_KEYS":rak,"STAGES":stages,"ROW_STAGES":rs}|dict(extra)
    try: code=jit.compile(src,arch='sm_90a',defines=de,name='hopper_backward.cu',include=c.include())
    except Exception as e: print(d,keys,rak,str(e)[:1500]); return
    print(d,keys,rak,stages,rs,jit.resource_usage(code.log),jit.spills(code.log),jit.performance_warnings(code.log)[:2])
if __name__=='__main__':
    go(128,96,0,3,1); go(128,64,1,4,1)
    go(128,80,0,3,1);go(128,112,0,2,1); go(64,128,0,3,1); go(64,96,1,4,2); go(64,128,1,3,1)
    go(64,80,1,3,1); go(32,128,1,3,1); go(96,64,1,3,1); go(96,96,0,3,1); go(256,32,0,2,1)
    go(128,96,0,3,1,dict(TEXT=1,DILATED=1,MAP_SETS=3).items()); go(128,64,1,4,1,dict(TEXT=1,DILATED=1,MAP_SETS=3).items())
