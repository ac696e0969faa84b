package checkpoint

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"time"
)

// WriteTar writes a checkpoint (id "" is the newest), or what is at and below a
// path of it, as a PAX archive. Names in it begin with the last part of the path.
// Returns ErrNotFound if there is no such path.
func (s *Session) WriteTar(ctx context.Context, id, sub string, w io.Writer) error {
	m, all, err := s.open(ctx, id)
	if err != nil {
		return err
	}
	sub = strings.Trim(path.Clean("/"+sub), "/")
	part, files := selectBelow(all, sub)
	if len(part) == 0 {
		return fmt.Errorf("%w: %q is not in %s", ErrNotFound, sub, m.ID)
	}
	ctx, cancel := context.WithCancel(ctx)
	ahead := s.r.ahead(ctx, part)
	defer ahead.wait()
	defer cancel()
	cut := strings.LastIndexByte(sub, '/') + 1
	t := tar.NewWriter(w)
	for i := range part {
		e := &part[i]
		h, err := header(e, cut)
		if err != nil {
			return fmt.Errorf("%q: %w", e.path, err)
		}
		if e.kind == kindLink { // its first name is in the archive
			h.Linkname = files[e.link][cut:]
		}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("archive %q: %w", e.path, err)
		}
		for _, x := range e.ext {
			if err := ahead.write(t, x); err != nil {
				return fmt.Errorf("archive %q: %w", e.path, s.gone(ctx, m.ID, err))
			}
		}
	}
	return t.Close()
}

// selectBelow gives the entries at and below sub. A further name whose first is
// outside becomes the first. The map says which name in the selection is first.
func selectBelow(all []entry, sub string) ([]entry, map[string]string) {
	files := map[string]*entry{}
	first := map[string]string{}
	var part []entry
	for i := range all {
		e := all[i]
		if e.kind == kindFile {
			files[e.path] = &all[i]
		}
		if sub != "" && e.path != sub && !strings.HasPrefix(e.path, sub+"/") {
			continue
		}
		switch e.kind {
		case kindFile:
			first[e.path] = e.path
		case kindLink:
			if first[e.link] == "" {
				first[e.link] = e.path
				of := *files[e.link]
				of.path = e.path
				e = of
			}
		}
		part = append(part, e)
	}
	return part, first
}

func header(e *entry, cut int) (*tar.Header, error) {
	h := &tar.Header{
		Format: tar.FormatPAX, Name: e.path[cut:], Mode: int64(e.mode), Uid: int(e.uid), Gid: int(e.gid),
		ModTime: time.Unix(0, e.mtime),
	}
	switch e.kind {
	case kindDir:
		h.Typeflag = tar.TypeDir
		if h.Name == "" {
			h.Name = "."
		}
		h.Name += "/"
	case kindFile:
		h.Typeflag, h.Size = tar.TypeReg, e.size
	case kindSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
	case kindFIFO:
		h.Typeflag = tar.TypeFifo
	case kindLink:
		h.Typeflag = tar.TypeLink
	default:
		return nil, fmt.Errorf("%w: kind %q", ErrDamaged, e.kind)
	}
	for _, x := range e.xattrs {
		if strings.Contains(x.name, "=") {
			continue // PAX cannot say it
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+x.name] = x.value
	}
	return h, nil
}

// readAhead reads blocks in the order in which they are needed, some before they are.
type readAhead struct {
	r     *Repository
	ctx   context.Context
	order []*block // distinct runs, in order of use
	next  int      // of order, to be asked for
	used  int      // of order, the one in use
	ready map[*block]chan struct{}
	text  map[*block][]byte
	fail  map[*block]error
	mu    sync.Mutex
	g     sync.WaitGroup
}

const aheadBlocks = 16

func (r *Repository) ahead(ctx context.Context, all []entry) *readAhead {
	a := &readAhead{r: r, ctx: ctx, used: -1, ready: map[*block]chan struct{}{}, text: map[*block][]byte{}, fail: map[*block]error{}}
	for _, e := range all {
		for _, x := range e.ext {
			if x.c != nil && (len(a.order) == 0 || a.order[len(a.order)-1] != x.c.blk) {
				a.order = append(a.order, x.c.blk)
			}
		}
	}
	return a
}

func (a *readAhead) wait() { a.g.Wait() }

// block gives the text of a block. Blocks must be asked for in order.
func (a *readAhead) block(b *block) ([]byte, error) {
	if a.used < 0 || a.order[a.used] != b {
		a.used++
		a.drop()
	}
	for a.next < len(a.order) && a.next <= a.used+aheadBlocks {
		a.ask(a.order[a.next])
		a.next++
	}
	<-a.ready[b]
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text[b], a.fail[b]
}

func (a *readAhead) ask(b *block) {
	if a.ready[b] != nil {
		return
	}
	done := make(chan struct{})
	a.ready[b] = done
	a.g.Go(func() {
		defer close(done)
		err := a.r.fetchJob(a.ctx, job{pack: b.pack, off: b.off, end: b.off + int64(b.stored), blocks: []*block{b}}, func(_ *block, plain []byte) error {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.text[b] = plain
			return nil
		})
		if err != nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.fail[b] = err
		}
	})
}

// drop forgets the block that was used before, unless it is wanted again soon.
func (a *readAhead) drop() {
	if a.used == 0 {
		return
	}
	old := a.order[a.used-1]
	for _, b := range a.order[a.used:min(len(a.order), max(a.next, a.used+1))] {
		if b == old {
			return
		}
	}
	<-a.ready[old]
	delete(a.ready, old)
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.text, old)
}

func (a *readAhead) write(w io.Writer, x extent) error {
	if x.c == nil {
		for n := x.hole; n > 0; {
			k := min(n, int64(len(zeros)))
			if _, err := w.Write(zeros[:k]); err != nil {
				return err
			}
			n -= k
		}
		return nil
	}
	plain, err := a.block(x.c.blk)
	if err != nil {
		return err
	}
	text, err := a.r.content(x.c, plain)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}
