package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"math"

	"golang.org/x/sys/unix"
)

// readBuffer is one walker's memory.
type readBuffer struct {
	dirents []byte
	text    []byte
}

// sized gives a buffer of n bytes.
func (b *readBuffer) sized(n int) []byte {
	if cap(b.text) < n {
		b.text = make([]byte, n)
	}
	return b.text[:n]
}

// pieces reads a file and calls use for each chunk, with nil and a length for a
// hole. The text is only there until use returns.
func (b *readBuffer) pieces(fd int, st sig, blocks int64, use func(text []byte, hole int64) error) error {
	off, hole := int64(0), int64(0)
	gap := func(n int64) { hole += n }
	emit := func(text []byte) error {
		if isZero(text) {
			gap(int64(len(text)))
			return nil
		}
		if hole > 0 {
			if err := use(nil, hole); err != nil {
				return err
			}
			hole = 0
		}
		return use(text, 0)
	}
	var begin [16]byte
	n, err := pread(fd, begin[:], 0)
	if err != nil && err != io.EOF {
		return err
	}
	cut := newCutter(st.size, begin[:n])
	if st.size <= smallFile && cut.fixed == 0 {
		cut = cutter{fixed: smallFile, top: smallFile}
	}
	sparse := blocks*512 < st.size
	for {
		end := int64(math.MaxInt64)
		if sparse {
			data, err := unix.Seek(fd, off, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // only a hole from here on
				data, err = unix.Seek(fd, 0, io.SeekEnd)
				if err == nil && data > off {
					gap(data - off)
				}
				if err != nil {
					return err
				}
				break
			}
			if err != nil {
				return err
			}
			gap(data - off)
			off = data
			if end, err = unix.Seek(fd, off, unix.SEEK_HOLE); errors.Is(err, unix.ENXIO) {
				break // it was cut short meanwhile
			} else if err != nil {
				return err
			}
		}
		next, err := b.run(fd, off, end, &cut, emit)
		if err != nil {
			return err
		}
		off = next
		if !sparse || off < end {
			break
		}
	}
	if hole > 0 {
		return use(nil, hole)
	}
	return nil
}

// run cuts the bytes from off to end, or to the file's end, where it stops.
func (b *readBuffer) run(fd int, off, end int64, cut *cutter, emit func([]byte) error) (int64, error) {
	buf := b.sized(max(4*cut.top, 256<<10))
	have, eof := 0, false
	for {
		if !eof {
			want := min(int64(len(buf)-have), end-off-int64(have))
			n, err := pread(fd, buf[have:have+int(want)], off+int64(have))
			if err != nil && err != io.EOF {
				return off, err
			}
			have += n
			eof = err == io.EOF || off+int64(have) == end
		}
		if have == 0 {
			return off, nil
		}
		rest := buf[:have]
		for len(rest) >= cut.top || eof && len(rest) > 0 {
			n := cut.cut(rest, off)
			if err := emit(rest[:n]); err != nil {
				return off, err
			}
			rest = rest[n:]
			off += int64(n)
		}
		have = copy(buf, rest)
		if eof && have == 0 {
			return off, nil
		}
	}
}

// store is a scan's take that sends what is new at once.
func (w *Writer) store(p *packer) func(*readBuffer, *node, int, string) (*content, error) {
	return func(b *readBuffer, n *node, fd int, path string) (*content, error) {
		c := &content{}
		err := b.pieces(fd, n.sig, blocksOf(fd), func(text []byte, hole int64) error {
			if text == nil {
				c.hole(hole)
				return nil
			}
			w.read.Add(int64(len(text)))
			ch, err := p.add(kindData, w.s.r.crypt.id(text), text)
			if err != nil {
				return err
			}
			c.chunk(ch)
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("read %q: %w", path, err)
		}
		return c, nil
	}
}

func (c *content) hole(n int64) {
	c.ext = append(c.ext, extent{hole: n})
	c.size += n
}

func (c *content) chunk(ch *chunk) {
	c.ext = append(c.ext, extent{c: ch})
	c.size += int64(ch.n)
	c.data += int64(ch.n)
}

func blocksOf(fd int) int64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return math.MaxInt64 / 512
	}
	return st.Blocks
}
