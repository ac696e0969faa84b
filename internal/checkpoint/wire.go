package checkpoint

import (
	"encoding/binary"
	"errors"
)

var errWire = errors.New("ends early or has a number out of range")

// wire reads what append… wrote. After the first error all reads give zero, so a
// decoder checks err once where it matters. Nothing is allocated by a number that
// was read before that number is held against what is left.
type wire struct {
	b   []byte
	err error
}

func (w *wire) fail() {
	w.err = errWire
	w.b = nil
}

func (w *wire) byte() byte {
	if len(w.b) < 1 {
		w.fail()
		return 0
	}
	c := w.b[0]
	w.b = w.b[1:]
	return c
}

func (w *wire) fixed(n int) []byte {
	if n < 0 || len(w.b) < n {
		w.fail()
		return make([]byte, min(max(n, 0), 64))
	}
	v := w.b[:n]
	w.b = w.b[n:]
	return v
}

// uint reads a number of at most limit.
func (w *wire) uint(limit uint64) uint64 {
	v, n := binary.Uvarint(w.b)
	if n <= 0 || v > limit {
		w.fail()
		return 0
	}
	w.b = w.b[n:]
	return v
}

// int reads a number of either sign.
func (w *wire) int() int64 {
	v, n := binary.Varint(w.b)
	if n <= 0 {
		w.fail()
		return 0
	}
	w.b = w.b[n:]
	return v
}

// count reads how many items of at least size bytes each follow.
func (w *wire) count(size int) int {
	return int(w.uint(uint64(len(w.b) / size)))
}

// bytes reads bytes with their length before them; they alias the input.
func (w *wire) bytes(limit int) []byte {
	n := w.uint(uint64(min(limit, len(w.b))))
	return w.fixed(int(n))
}

func appendBytes[T string | []byte](b []byte, v T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(v))), v...)
}
