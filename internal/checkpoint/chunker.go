package checkpoint

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// How files are cut. A file of smallFile bytes or less is one chunk. Databases of
// SQLite and their logs are cut in blocks of equal size, because they are written
// in pages in place and at the end. All else is cut by content (FastCDC), so that
// what is inserted moves no cut behind it.
const (
	smallFile   = 64 << 10
	sqliteBlock = 32 << 10
	meanChunk   = 64 << 10
)

// cutter says where chunks end.
type cutter struct {
	fixed          int // size of all chunks, or 0
	low, mean, top int
	early, late    uint64 // masks before and behind the mean
}

// newCutter for a file of this size that begins with these bytes.
func newCutter(size int64, begin []byte) cutter {
	if isSQLite(begin) {
		return cutter{fixed: sqliteBlock, top: sqliteBlock}
	}
	mean := meanChunk
	switch {
	case size > 4<<30:
		mean <<= 4
	case size > 256<<20:
		mean <<= 2
	}
	b := bits.Len(uint(mean)) - 1
	// Bits high in the hash depend on the most bytes. Two more bits before the mean
	// and two less behind it keep sizes close together.
	return cutter{low: mean / 4, mean: mean, top: mean * 4, early: ^uint64(0) << (64 - b - 2), late: ^uint64(0) << (64 - b + 2)}
}

func isSQLite(begin []byte) bool {
	if bytes.HasPrefix(begin, []byte("SQLite format 3\x00")) {
		return true
	}
	return len(begin) >= 4 && binary.BigEndian.Uint32(begin)&^1 == 0x377f0682 // its write-ahead log
}

// cut gives the length of the next chunk of b, which holds c.top bytes or all
// there is. off is where b is in the file.
func (c *cutter) cut(b []byte, off int64) int {
	if c.fixed > 0 {
		return min(len(b), c.fixed-int(off%int64(c.fixed)))
	}
	if len(b) <= c.low {
		return len(b)
	}
	if len(b) > c.top {
		b = b[:c.top]
	}
	h := uint64(0)
	i := c.low
	for _, x := range b[i:min(len(b), c.mean)] {
		i++
		if h = h<<1 + gear[x]; h&c.early == 0 {
			return i
		}
	}
	for _, x := range b[i:] {
		i++
		if h = h<<1 + gear[x]; h&c.late == 0 {
			return i
		}
	}
	return len(b)
}

// gear is 256 numbers without pattern. They decide only where files are cut: a
// reader does not need them.
var gear = func() (g [256]uint64) {
	x := uint64(0)
	for i := range g { // splitmix64
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		g[i] = z ^ z>>31
	}
	return g
}()

var zeros [64 << 10]byte

// isZero says whether b is zeros only.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}
