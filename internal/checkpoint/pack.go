package checkpoint

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"
)

// A pack is
//
//	header   magic, 1 byte flags, 8 bytes key id, 16 bytes its own id
//	blocks   sealed texts of one or more chunks each
//	index    sealed list of the blocks and their chunks
//	footer   4 bytes length of the index (little endian), SHA-256 of header and
//	         sealed index, magic
//
// so that it explains itself without any manifest.
const (
	packMagic    = "ccpack01"
	packEndMagic = "ccpackND"
	packHeader   = len(packMagic) + 1 + keyIDSize + 16
	packFooter   = 4 + sha256.Size + len(packEndMagic)

	flagEncrypted = 1

	// packSize is when a pack is closed: large enough for few requests, small
	// enough for several in flight.
	packSize = 6 << 20
	// blockSize is how much plain content is compressed together.
	blockSize = 512 << 10
	// maxChunk bounds a chunk, maxBlock a block: one below blockSize plus one chunk.
	maxChunk = 8 << 20
	maxBlock = maxChunk + blockSize
	// maxPack bounds what a reader believes of a pack.
	maxPack = 64 << 20
)

const (
	kindData = 'd' // content of files
	kindMeta = 'm' // segments and lists
)

type packID [16]byte

func newPackID() (id packID) {
	rand.Read(id[:])
	return id
}

func (id packID) String() string { return hex.EncodeToString(id[:]) }

// pack is one pack, as far as a repository's user knows it.
type pack struct {
	id    packID
	size  int64 // of its blocks, sealed
	plain int64 // … and not

	// Of the writer only.
	uploaded  time.Time // zero: it came with a manifest
	committed bool      // the head's manifest names it
	lost      bool      // not to be relied on
}

// block is a run of chunks that were compressed together.
type block struct {
	pack   *pack // nil until it is placed
	off    int64
	stored uint32
	plain  uint32
	kind   byte
	failed bool // it never got into a pack
}

// chunk is a piece of content and where it is.
type chunk struct {
	id  chunkID
	blk *block
	off uint32 // in the block's plain text
	n   uint32
}

// usable: a new manifest may refer to it.
func (c *chunk) usable() bool {
	if c.blk.pack == nil {
		return !c.blk.failed
	}
	return !c.blk.pack.lost
}

// packBlock is a block as the index of its pack has it.
type packBlock struct {
	kind   byte
	stored uint32
	plain  uint32
	chunks []packChunk
}

type packChunk struct {
	id chunkID
	n  uint32
}

func (c *cryptor) packHeader(id packID) []byte {
	h := append(make([]byte, 0, packHeader), packMagic...)
	h = append(h, c.flags())
	h = append(h, c.keyID[:]...)
	return append(h, id[:]...)
}

func (c *cryptor) flags() byte {
	if c.encrypted() {
		return flagEncrypted
	}
	return 0
}

// packTrailer is what follows the blocks.
func (c *cryptor) packTrailer(id packID, blocks []packBlock) []byte {
	header := c.packHeader(id)
	sealed := c.seal("pack index", header, appendPackIndex(nil, blocks))
	out := append([]byte(nil), sealed...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(sealed)))
	sum := sha256.New()
	sum.Write(header)
	sum.Write(sealed)
	out = sum.Sum(out)
	return append(out, packEndMagic...)
}

func appendPackIndex(b []byte, blocks []packBlock) []byte {
	b = binary.AppendUvarint(b, uint64(len(blocks)))
	for _, k := range blocks {
		b = append(b, k.kind)
		b = binary.AppendUvarint(b, uint64(k.stored))
		b = binary.AppendUvarint(b, uint64(k.plain))
		b = binary.AppendUvarint(b, uint64(len(k.chunks)))
		for _, ch := range k.chunks {
			b = append(b, ch.id[:]...)
			b = binary.AppendUvarint(b, uint64(ch.n))
		}
	}
	return b
}

// checkKey says whether an object with these header fields is for this key.
func (c *cryptor) checkKey(flags byte, keyID []byte) error {
	switch encrypted := flags&flagEncrypted != 0; {
	case flags&^flagEncrypted != 0:
		return fmt.Errorf("%w: unknown flags %#x", ErrDamaged, flags)
	case encrypted && !c.encrypted():
		return fmt.Errorf("%w: it is encrypted and no key is given", ErrKey)
	case !encrypted && c.encrypted():
		return fmt.Errorf("%w: it is not encrypted, but a key is given", ErrKey)
	case !bytes.Equal(keyID, c.keyID[:]):
		return fmt.Errorf("%w: it is encrypted with another key", ErrKey)
	}
	return nil
}

// readPackIndex reads header and trailer of a whole pack.
func (c *cryptor) readPackIndex(id packID, p []byte) ([]packBlock, error) {
	if len(p) < packHeader+packFooter || string(p[:len(packMagic)]) != packMagic {
		return nil, fmt.Errorf("%w: it is no pack", ErrDamaged)
	}
	flags, keyID := p[len(packMagic)], p[len(packMagic)+1:][:keyIDSize]
	if err := c.checkKey(flags, keyID); err != nil {
		return nil, err
	}
	header, footer := p[:packHeader], p[len(p)-packFooter:]
	if !bytes.Equal(header, c.packHeader(id)) {
		return nil, fmt.Errorf("%w: it is another pack", ErrDamaged)
	}
	n := int(binary.LittleEndian.Uint32(footer))
	if string(footer[4+sha256.Size:]) != packEndMagic || n > len(p)-packHeader-packFooter {
		return nil, fmt.Errorf("%w: it has no end", ErrDamaged)
	}
	sealed := p[len(p)-packFooter-n : len(p)-packFooter]
	sum := sha256.New()
	sum.Write(header)
	sum.Write(sealed)
	if !bytes.Equal(sum.Sum(nil), footer[4:4+sha256.Size]) {
		return nil, fmt.Errorf("%w: wrong checksum of its index", ErrDamaged)
	}
	plain, err := c.open("pack index", header, sealed, -maxPack)
	if err != nil {
		return nil, fmt.Errorf("its index: %w", err)
	}
	blocks, err := decodePackIndex(plain)
	if err != nil {
		return nil, fmt.Errorf("%w: its index: %w", ErrDamaged, err)
	}
	total := int64(0)
	for _, k := range blocks {
		total += int64(k.stored)
	}
	if total != int64(len(p)-packHeader-packFooter-n) {
		return nil, fmt.Errorf("%w: its blocks do not fill it", ErrDamaged)
	}
	return blocks, nil
}

func decodePackIndex(plain []byte) ([]packBlock, error) {
	w := wire{b: plain}
	var blocks []packBlock
	for range w.count(4) {
		k := packBlock{kind: w.byte(), stored: uint32(w.uint(maxPack)), plain: uint32(w.uint(maxBlock))}
		sum := uint64(0)
		for range w.count(len(chunkID{}) + 1) {
			ch := packChunk{id: chunkID(w.fixed(len(chunkID{}))), n: uint32(w.uint(maxChunk))}
			sum += uint64(ch.n)
			k.chunks = append(k.chunks, ch)
		}
		if w.err == nil && sum != uint64(k.plain) {
			return nil, fmt.Errorf("a block of %d bytes has chunks of %d", k.plain, sum)
		}
		blocks = append(blocks, k)
	}
	if w.err == nil && len(w.b) != 0 {
		return nil, fmt.Errorf("%d bytes too many", len(w.b))
	}
	return blocks, w.err
}
