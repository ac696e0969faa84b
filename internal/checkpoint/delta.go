package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var errLarge = errors.New("too much to take while frozen")

// delta is what the frozen walk takes. Nothing is compressed or sent while the
// session stands still.
type delta struct {
	w    *Writer
	p    *packer
	last bool // take it whatever its size

	mu    sync.Mutex
	bytes int64
	spill spill
	files []*taken
}

// taken is a file of it.
type taken struct {
	n     *node
	parts []part
}

// part of a file: a hole, a chunk that is in the store, or text to be added. Text
// of a file taken whole is not cut yet.
type part struct {
	known *chunk
	hole  int64
	id    chunkID
	text  stash
	whole bool
}

// take reads a file in the frozen walk.
func (d *delta) take(b *readBuffer, n *node, fd int, path string) (*content, error) {
	t := &taken{n: n}
	err := d.parts(b, t, fd)
	if err != nil {
		if errors.Is(err, errLarge) {
			return nil, err
		}
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.files = append(d.files, t)
	return nil, nil
}

func (d *delta) parts(b *readBuffer, t *taken, fd int) error {
	if t.n.sig.size <= wholeMax && blocksOf(fd)*512 >= t.n.sig.size {
		text := make([]byte, t.n.sig.size)
		n, err := pread(fd, text, 0)
		if err != nil && err != io.EOF {
			return err
		}
		st, err := d.keep(text[:n])
		t.parts = append(t.parts, part{text: st, whole: true})
		return err
	}
	return b.pieces(fd, t.n.sig, blocksOf(fd), func(text []byte, hole int64) error {
		if text == nil {
			t.parts = append(t.parts, part{hole: hole})
			return nil
		}
		d.w.read.Add(int64(len(text)))
		id := d.w.s.r.crypt.id(text)
		if c := d.p.known(id); c != nil {
			t.parts = append(t.parts, part{known: c})
			return nil
		}
		st, err := d.keep(append([]byte(nil), text...))
		t.parts = append(t.parts, part{id: id, text: st})
		return err
	})
}

// keep holds text until the session runs again.
func (d *delta) keep(text []byte) (stash, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bytes += int64(len(text))
	if d.bytes > d.w.o.deltaMax && !d.last {
		return stash{}, errLarge
	}
	if d.bytes <= d.w.o.deltaMax {
		return stash{text: text, n: len(text)}, nil
	}
	return d.spill.write(text)
}

// store adds all that was taken, and gives the nodes their content.
func (d *delta) store() error {
	for _, t := range d.files {
		c := &content{}
		for i := range t.parts {
			if err := d.part(c, &t.parts[i]); err != nil {
				return err
			}
		}
		t.n.content = c
	}
	return nil
}

func (d *delta) part(c *content, p *part) error {
	switch {
	case p.known != nil:
		c.chunk(p.known)
		return nil
	case p.hole > 0:
		c.hole(p.hole)
		return nil
	}
	text, err := d.spill.read(p.text)
	p.text.text = nil
	if err != nil {
		return err
	}
	if !p.whole {
		ch, err := d.p.add(kindData, p.id, text)
		if err == nil {
			c.chunk(ch)
		}
		return err
	}
	d.w.read.Add(int64(len(text)))
	cut := newCutter(int64(len(text)), text)
	if len(text) <= smallFile && cut.fixed == 0 {
		cut = cutter{fixed: smallFile, top: smallFile}
	}
	hole := int64(0)
	for off := int64(0); len(text) > 0; {
		n := cut.cut(text, off)
		piece := text[:n]
		text = text[n:]
		off += int64(n)
		if isZero(piece) {
			if hole += int64(n); len(text) == 0 {
				c.hole(hole)
			}
			continue
		}
		if hole > 0 {
			c.hole(hole)
			hole = 0
		}
		ch, err := d.p.add(kindData, d.w.s.r.crypt.id(piece), piece)
		if err != nil {
			return err
		}
		c.chunk(ch)
	}
	return nil
}

// spill is a file without name for what does not fit in memory.
type spill struct {
	dir string
	f   *os.File
	end int64
}

type stash struct {
	text []byte // nil: in the file
	off  int64
	n    int
}

func (s *spill) write(text []byte) (stash, error) {
	if s.f == nil {
		dir := s.dir
		if dir == "" {
			dir = os.TempDir()
		}
		fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return stash{}, fmt.Errorf("make a staging file in %s: %w", dir, err)
		}
		s.f = os.NewFile(uintptr(fd), dir)
	}
	if _, err := s.f.WriteAt(text, s.end); err != nil {
		return stash{}, fmt.Errorf("staging: %w", err)
	}
	st := stash{off: s.end, n: len(text)}
	s.end += int64(len(text))
	return st, nil
}

func (s *spill) read(st stash) ([]byte, error) {
	if st.text != nil || st.n == 0 {
		return st.text, nil
	}
	b := make([]byte, st.n)
	if _, err := s.f.ReadAt(b, st.off); err != nil {
		return nil, fmt.Errorf("staging: %w", err)
	}
	return b, nil
}

func (s *spill) close() {
	if s.f != nil {
		s.f.Close()
	}
}
