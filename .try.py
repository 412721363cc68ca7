import sys; sys.path.insert(0,'.')
from gna_flex.cuda import jit
from gna_flex.cuda.backward import BackwardConfig as C
def go(c):
    try:
        code=c.compile('sm_90a'); print(c.head_dim,c.keys,c.rows_are_keys,c.query_stages,c.key_stages,c.text,jit.spills(code.log),[u.spill_loads for u in jit.resource_usage(code.log)],[w[-100:] for w in jit.performance_warnings(code.log)])
    except Exception as e: print(c, str(e)[-300:])
if __name__=='__main__':
    for text in (False,True):
        go(C(128,64,query_stages=1,key_stages=4,rows_are_keys=True,text=text,dilated=text)); go(C(64,96,key_stages=4,rows_are_keys=True,text=text,dilated=text)); go(C(128,48,query_stages=1,key_stages=4,rows_are_keys=True,text=text,dilated=text))
