package logger

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"time"
)

// pollInterval is how soon Follow sees a new line.
const pollInterval = 200 * time.Millisecond

// Line of a container's output.
type Line struct {
	Time    time.Time
	Stream  string // "stdout" or "stderr"
	Text    string // without the newline
	Partial bool   // the rest of the line is in the next Line of this stream
}

// ReadOptions choose what Read gives.
type ReadOptions struct {
	// Follow goes on with new lines until the context ends.
	Follow bool
	// TailLines, when above zero, starts with that many of the last lines;
	// below zero with none of them (Follow: only what is new).
	TailLines int
	// Since leaves out older lines. The zero time leaves out none.
	Since time.Time
}

// Read gives the lines in dir, oldest first and across rotated files. It ends
// at the last line, or with Follow when ctx ends, without an error. A folder
// without logs is empty, not an error. Damaged lines are skipped.
func Read(ctx context.Context, dir string, opts ReadOptions) iter.Seq2[Line, error] {
	return func(yield func(Line, error) bool) {
		c := cursor{dir: dir}
		defer c.close()
		if err := c.start(opts); err != nil {
			yield(Line{}, err)
			return
		}
		for {
			line, err := c.next()
			switch {
			case err == nil:
				if line.Time.Before(opts.Since) {
					continue
				}
				if !yield(line, nil) {
					return
				}
				continue
			case !errors.Is(err, io.EOF):
				yield(Line{}, err)
				return
			case !opts.Follow:
				return
			}
			t := time.NewTimer(pollInterval)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
		}
	}
}

// cursor reads on through rotations: it holds the file it is in open, and
// finds that file's place among the rotated ones by inode.
type cursor struct {
	dir  string
	f    *os.File
	br   *bufio.Reader
	part []byte // begin of a line whose end is not written yet
}

func (c *cursor) close() {
	if c.f != nil {
		_ = c.f.Close()
	}
}

func (c *cursor) open(i int) error {
	f, err := os.Open(rotated(c.dir, i))
	if err != nil {
		return err
	}
	c.close()
	c.f, c.part = f, nil
	c.br = bufio.NewReaderSize(f, 64<<10)
	return nil
}

// start goes to the first line wanted.
func (c *cursor) start(opts ReadOptions) error {
	if opts.TailLines == 0 {
		return c.openOldest()
	}
	want := max(opts.TailLines, 0)
	for i := range MaxFiles {
		f, err := os.Open(rotated(c.dir, i))
		if errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return err
		}
		off, have, err := tail(f, want)
		if err != nil {
			_ = f.Close()
			return fmt.Errorf("reading %s: %w", f.Name(), err)
		}
		c.close()
		c.f, c.part = f, nil
		if _, err := f.Seek(off, io.SeekStart); err != nil {
			return err
		}
		c.br = bufio.NewReaderSize(f, 64<<10)
		if want -= have; want <= 0 {
			break
		}
	}
	return nil
}

func (c *cursor) openOldest() error {
	for i := MaxFiles - 1; i >= 0; i-- {
		if err := c.open(i); err == nil {
			return nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// tail returns where the last n lines of f begin and how many there are, at most n.
func tail(f *os.File, n int) (off int64, have int, err error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	end := fi.Size()
	if n == 0 {
		return end, 0, nil
	}
	const block = 64 << 10
	buf := make([]byte, block)
	found := 0 // newlines seen, from the end; the last byte's own counts too
	for pos := end; pos > 0; {
		size := min(pos, block)
		pos -= size
		if _, err := f.ReadAt(buf[:size], pos); err != nil {
			return 0, 0, err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' {
				continue
			}
			if found++; found > n {
				return pos + i + 1, n, nil
			}
		}
	}
	return 0, found, nil
}

// next returns io.EOF when there is no further line now.
func (c *cursor) next() (Line, error) {
	for {
		if c.f == nil {
			if err := c.openOldest(); err != nil {
				return Line{}, err
			}
			if c.f == nil {
				return Line{}, io.EOF
			}
		}
		raw, err := c.br.ReadBytes('\n')
		c.part = append(c.part, raw...)
		if err == nil {
			line, ok := parse(c.part[:len(c.part)-1])
			c.part = c.part[:0]
			if ok {
				return line, nil
			}
			continue
		}
		if !errors.Is(err, io.EOF) {
			return Line{}, err
		}
		moved, err := c.newer()
		if err != nil {
			return Line{}, err
		}
		if !moved {
			return Line{}, io.EOF
		}
	}
}

// newer goes to the file that follows the present one, if it was rotated away.
func (c *cursor) newer() (bool, error) {
	here, err := c.f.Stat()
	if err != nil {
		return false, err
	}
	at := MaxFiles // rotated out of existence: the oldest one left is next
	for i := range MaxFiles {
		if fi, err := os.Stat(rotated(c.dir, i)); err == nil && os.SameFile(fi, here) {
			at = i
			break
		}
	}
	if at == 0 {
		return false, nil
	}
	// The writer may have added to the old file between our last read and its
	// rotation.
	if fi, err := c.f.Stat(); err == nil {
		if pos, err := c.f.Seek(0, io.SeekCurrent); err == nil && fi.Size() > pos {
			return true, nil
		}
	}
	for i := at - 1; i >= 0; i-- {
		if err := c.open(i); err == nil {
			return true, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}

func parse(raw []byte) (Line, bool) {
	at, rest, ok1 := bytes.Cut(raw, []byte{' '})
	stream, rest, ok2 := bytes.Cut(rest, []byte{' '})
	tag, text, ok3 := bytes.Cut(rest, []byte{' '})
	t, err := time.Parse(timeFormat, string(at))
	if !ok1 || !ok2 || !ok3 || err != nil {
		return Line{}, false
	}
	return Line{Time: t, Stream: string(stream), Text: string(text), Partial: string(tag) == "P"}, true
}
