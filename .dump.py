import sys; sys.path.insert(0,'.')
from gna_flex.cuda import jit
from gna_flex.cuda.kernel import Config
d,keys,rak,st,rs=map(int,sys.argv[1:6])
c=Config(d,keys)
code=jit.compile((jit.source_folder()/'hopper'/'backward.cu').read_text(),arch='sm_90a',defines=c.defines()|{"ROWS_ARE_KEYS":rak,"STAGES":st,"ROW_STAGES":rs},name='b.cu',include=c.include())
open('/tmp/b.cubin','wb').write(code.code)
