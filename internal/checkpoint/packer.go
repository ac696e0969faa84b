package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// uploads is how many packs are on their way at a time.
const uploads = 4

// packer takes chunks, gathers them in blocks and these in packs, and uploads
// packs while more come. It is used for one Save.
type packer struct {
	r       *Repository
	ctx     context.Context
	cancel  context.CancelFunc
	arrived func(p *pack, blocks []packBlock) // a pack is in the store

	mu     sync.Mutex
	index  map[chunkID]*chunk // the writer's, guarded by mu while the packer lives
	fill   map[byte]*filling  // by kind
	blocks []*block           // all of this packer
	cur    *building
	packs  []*pack
	sent   int64 // bytes uploaded
	err    error

	sealing   chan struct{} // one token per block being compressed
	uploading chan struct{} // … and per pack being uploaded
	sealed    sync.WaitGroup
	uploaded  sync.WaitGroup
}

type filling struct {
	blk    *block
	plain  []byte
	chunks []packChunk
}

type building struct {
	pack   *pack
	text   []byte
	blocks []packBlock
}

func (r *Repository) newPacker(ctx context.Context, index map[chunkID]*chunk, arrived func(*pack, []packBlock)) *packer {
	p := &packer{
		r: r, index: index, arrived: arrived, fill: map[byte]*filling{},
		sealing: make(chan struct{}, runtime.GOMAXPROCS(0)), uploading: make(chan struct{}, uploads),
	}
	p.ctx, p.cancel = context.WithCancel(ctx)
	return p
}

// known gives the chunk if it is, or will be, in the store.
func (p *packer) known(id chunkID) *chunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.index[id]; c != nil && c.usable() {
		return c
	}
	return nil
}

// add stores a chunk, unless it is known. It copies plain.
func (p *packer) add(kind byte, id chunkID, plain []byte) (*chunk, error) {
	p.mu.Lock()
	if p.err != nil {
		defer p.mu.Unlock()
		return nil, p.err
	}
	if c := p.index[id]; c != nil && c.usable() {
		p.mu.Unlock()
		return c, nil
	}
	f := p.fill[kind]
	if f == nil {
		f = &filling{blk: &block{kind: kind}, plain: (*buffers.Get().(*[]byte))[:0]}
		p.fill[kind] = f
		p.blocks = append(p.blocks, f.blk)
	}
	c := &chunk{id: id, blk: f.blk, off: uint32(len(f.plain)), n: uint32(len(plain))}
	f.plain = append(f.plain, plain...)
	f.chunks = append(f.chunks, packChunk{id, c.n})
	p.index[id] = c
	if len(f.plain) < blockSize {
		p.mu.Unlock()
		return c, nil
	}
	delete(p.fill, kind)
	p.mu.Unlock()
	return c, p.submit(f)
}

var buffers = sync.Pool{New: func() any {
	b := make([]byte, 0, blockSize+meanChunk)
	return &b
}}

// submit compresses a block and puts it into the current pack.
func (p *packer) submit(f *filling) error {
	select {
	case p.sealing <- struct{}{}:
	case <-p.ctx.Done():
		return p.fail(context.Cause(p.ctx))
	}
	p.sealed.Go(func() {
		text := p.r.crypt.seal("block", nil, f.plain)
		<-p.sealing
		n := len(f.plain)
		if plain := f.plain; cap(plain) <= 2*blockSize {
			buffers.Put(&plain)
		}
		f.plain = nil
		p.place(f, text, n)
	})
	return nil
}

func (p *packer) place(f *filling, text []byte, plain int) {
	p.mu.Lock()
	if p.cur == nil {
		id := newPackID()
		p.cur = &building{pack: &pack{id: id}, text: append(make([]byte, 0, packSize+blockSize), p.r.crypt.packHeader(id)...)}
		p.packs = append(p.packs, p.cur.pack)
	}
	b := p.cur
	f.blk.pack, f.blk.off, f.blk.stored, f.blk.plain = b.pack, int64(len(b.text)), uint32(len(text)), uint32(plain)
	b.text = append(b.text, text...)
	b.blocks = append(b.blocks, packBlock{kind: f.blk.kind, stored: uint32(len(text)), plain: uint32(plain), chunks: f.chunks})
	b.pack.size += int64(len(text))
	b.pack.plain += int64(plain)
	if len(b.text) < packSize {
		p.mu.Unlock()
		return
	}
	p.cur = nil
	p.mu.Unlock()
	p.upload(b)
}

func (p *packer) upload(b *building) {
	select {
	case p.uploading <- struct{}{}:
	case <-p.ctx.Done():
		p.fail(context.Cause(p.ctx))
		return
	}
	p.uploaded.Go(func() {
		defer func() { <-p.uploading }()
		text := append(b.text, p.r.crypt.packTrailer(b.pack.id, b.blocks)...)
		key := p.r.pack(b.pack.id)
		_, err := p.r.store.Put(p.ctx, key, text, objstore.PutOptions{ContentType: "application/octet-stream"})
		if errors.Is(err, objstore.ErrUnavailable) {
			// Perhaps only the answer was lost.
			if o, statErr := p.r.store.Stat(p.ctx, key); statErr == nil && o.Size == int64(len(text)) {
				err = nil
			}
		}
		if err != nil {
			p.fail(fmt.Errorf("write %s: %w", key, err))
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		b.pack.uploaded = time.Now()
		p.sent += int64(len(text))
		p.arrived(b.pack, b.blocks)
	})
}

func (p *packer) fail(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
		p.cancel()
	}
	return p.err
}

// flush returns when all chunks have their place in a pack.
func (p *packer) flush() error {
	p.mu.Lock()
	fill := p.fill
	p.fill = map[byte]*filling{}
	p.mu.Unlock()
	for _, f := range fill {
		if err := p.submit(f); err != nil {
			return err
		}
	}
	p.sealed.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// finish returns when all packs are in the store.
func (p *packer) finish() error {
	if err := p.flush(); err != nil {
		return err
	}
	p.mu.Lock()
	b := p.cur
	p.cur = nil
	p.mu.Unlock()
	if b != nil {
		p.upload(b)
	}
	p.uploaded.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// close ends the packer, whatever is under way. What is not in the store by now
// never was: it reports whether there is such.
func (p *packer) close() (lost bool) {
	p.cancel()
	p.sealed.Wait()
	p.uploaded.Wait()
	for _, b := range p.blocks {
		if b.pack == nil {
			b.failed, lost = true, true
		}
	}
	for _, k := range p.packs {
		if k.uploaded.IsZero() {
			k.lost, lost = true, true
		}
	}
	return lost
}
