package checkpoint

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Kinds of entries.
const (
	kindDir     = 'd'
	kindFile    = 'f'
	kindSymlink = 'l'
	kindFIFO    = 'p'
	kindLink    = 'h' // further name of a file; link is the first
)

const (
	maxPath    = 1 << 20
	maxXattr   = 64 << 10 // the kernel's
	segVersion = 1

	// A writer keeps well below what a reader takes: folders with longer paths are
	// noted and left out, for a walk to such depths takes time while the session
	// stands still; attributes beyond that size are left out.
	maxTreePath = 4096 // the kernel's for one call: no tool makes more
	maxXattrs   = 256 << 10

	// What a whole tree may have, in a writer and in a reader: a reader holds all of
	// it, and a few bytes in a bucket can say that there is much.
	maxEntries = 1 << 24
	maxExtents = 1 << 24
	maxPaths   = 2 << 30 // bytes of all paths
	maxTree    = 2 << 30 // bytes of all segments, and of all lists
	// maxSegmentPaths is for one segment: sixteen times what a writer needs.
	maxSegmentPaths = 16 * segmentMax * maxTreePath

	// Segments are cut behind an entry whose path's hash says so, which depends
	// on nothing else: what is changed elsewhere does not move the cuts.
	segmentMin   = 32
	segmentMean  = 128
	segmentMax   = 1024
	segmentBytes = 1 << 20
	maxSegment   = maxChunk

	// listAt is how many extents a file may have before they go into lists of
	// their own, so that a change in a large file does not send all of them again.
	listAt   = 256
	listMean = 128
	listMax  = 1024
)

// extent is a part of a file: a chunk or, without one, a hole.
type extent struct {
	c    *chunk
	hole int64
}

func (e extent) size() int64 {
	if e.c == nil {
		return e.hole
	}
	return int64(e.c.n)
}

type xattr struct {
	name  string
	value string
}

// entry is one name in a tree.
type entry struct {
	path   string // relative, "" is the tree itself
	kind   byte
	mode   uint32 // 07777
	uid    uint32 // inside the container
	gid    uint32
	mtime  int64 // ns
	size   int64 // of a file
	link   string
	xattrs []xattr
	ext    []extent
	lists  bool // ext are chunks that hold the extents
}

// comparePaths orders paths as a walk meets them: a folder before what is in it,
// and that before the next name.
func comparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if x, y := a[i], b[i]; x != y {
			if x == '/' {
				return -1
			}
			if y == '/' {
				return 1
			}
			return cmp.Compare(x, y)
		}
	}
	return cmp.Compare(len(a), len(b))
}

// encoder writes extents and entries. Packs and blocks are named once, in tables
// before what refers to them.
type encoder struct {
	packs  map[*pack]uint64
	blocks map[*block]uint64
	ptab   []byte
	btab   []byte
	body   []byte
	count  int
	last   string // path of the last entry
	cursor *block // last block used: mostly the next is the same
	curIdx uint64
}

func newEncoder() *encoder {
	return &encoder{packs: map[*pack]uint64{}, blocks: map[*block]uint64{}}
}

func (e *encoder) reset() {
	clear(e.packs)
	clear(e.blocks)
	e.ptab, e.btab, e.body, e.count, e.last, e.cursor = e.ptab[:0], e.btab[:0], e.body[:0], 0, "", nil
}

func (e *encoder) block(b *block) uint64 {
	if b == e.cursor {
		return e.curIdx
	}
	i, ok := e.blocks[b]
	if !ok {
		p, ok := e.packs[b.pack]
		if !ok {
			p = uint64(len(e.packs))
			e.packs[b.pack] = p
			e.ptab = append(e.ptab, b.pack.id[:]...)
		}
		i = uint64(len(e.blocks))
		e.blocks[b] = i
		e.btab = binary.AppendUvarint(e.btab, p)
		e.btab = binary.AppendUvarint(e.btab, uint64(b.off))
		e.btab = binary.AppendUvarint(e.btab, uint64(b.stored))
		e.btab = binary.AppendUvarint(e.btab, uint64(b.plain))
	}
	e.cursor, e.curIdx = b, i
	return i
}

func (e *encoder) extents(ext []extent) {
	e.body = binary.AppendUvarint(e.body, uint64(len(ext)))
	for _, x := range ext {
		e.extent(x)
	}
}

func (e *encoder) extent(x extent) {
	if x.c == nil {
		e.body = append(e.body, 0)
		e.body = binary.AppendUvarint(e.body, uint64(x.hole))
		return
	}
	e.body = binary.AppendUvarint(e.body, e.block(x.c.blk)+1)
	e.body = binary.AppendUvarint(e.body, uint64(x.c.off))
	e.body = binary.AppendUvarint(e.body, uint64(x.c.n))
	e.body = append(e.body, x.c.id[:]...)
}

func (e *encoder) entry(n *entry) {
	shared := 0
	for m := min(len(n.path), len(e.last)); shared < m && n.path[shared] == e.last[shared]; {
		shared++
	}
	e.body = append(e.body, n.kind)
	e.body = binary.AppendUvarint(e.body, uint64(shared))
	e.body = appendBytes(e.body, n.path[shared:])
	e.last = n.path
	e.count++
	if n.kind == kindLink {
		e.body = appendBytes(e.body, n.link)
		return
	}
	e.body = binary.AppendUvarint(e.body, uint64(n.mode))
	e.body = binary.AppendUvarint(e.body, uint64(n.uid))
	e.body = binary.AppendUvarint(e.body, uint64(n.gid))
	e.body = binary.AppendVarint(e.body, n.mtime)
	e.body = binary.AppendUvarint(e.body, uint64(len(n.xattrs)))
	for _, x := range n.xattrs {
		e.body = appendBytes(e.body, x.name)
		e.body = appendBytes(e.body, x.value)
	}
	switch n.kind {
	case kindSymlink:
		e.body = appendBytes(e.body, n.link)
	case kindFile:
		e.body = binary.AppendUvarint(e.body, uint64(n.size))
		lists := byte(0)
		if n.lists {
			lists = 1
		}
		e.body = append(e.body, lists)
		e.extents(n.ext)
	}
}

// bytes is the encoded text: version, tables, number of items, items.
func (e *encoder) bytes() []byte {
	b := make([]byte, 0, len(e.ptab)+len(e.btab)+len(e.body)+32)
	b = append(b, segVersion)
	b = binary.AppendUvarint(b, uint64(len(e.packs)))
	b = append(b, e.ptab...)
	b = binary.AppendUvarint(b, uint64(len(e.blocks)))
	b = append(b, e.btab...)
	b = binary.AppendUvarint(b, uint64(e.count))
	return append(b, e.body...)
}

// catalog makes one pack of each id and one block of each place, whoever mentions
// it. With packs nil it takes any pack, else only those that are there already.
type catalog struct {
	packs  map[packID]*pack
	blocks map[place]*block
	chunks map[chunkID]*chunk // nil: chunks are not joined
	closed bool
}

type place struct {
	p   *pack
	off int64
}

func newCatalog() *catalog {
	return &catalog{packs: map[packID]*pack{}, blocks: map[place]*block{}}
}

func (c *catalog) pack(id packID) (*pack, error) {
	p := c.packs[id]
	if p == nil {
		if c.closed {
			return nil, fmt.Errorf("it needs pack %s, which its manifest does not name", id)
		}
		p = &pack{id: id}
		c.packs[id] = p
	}
	return p, nil
}

func (c *catalog) block(p *pack, off int64, stored, plain uint32) (*block, error) {
	at := place{p, off}
	b := c.blocks[at]
	if b == nil {
		b = &block{pack: p, off: off, stored: stored, plain: plain}
		c.blocks[at] = b
	}
	if b.stored != stored || b.plain != plain {
		return nil, fmt.Errorf("two sizes of a block in pack %s", p.id)
	}
	return b, nil
}

type decoder struct {
	wire
	cat    *catalog
	blocks []*block
}

// newDecoder reads version and tables.
func newDecoder(cat *catalog, text []byte) (*decoder, int, error) {
	d := &decoder{wire: wire{b: text}, cat: cat}
	if v := d.byte(); d.err == nil && v != segVersion {
		return nil, 0, fmt.Errorf("version %d is not known here: use a newer cloudcode", v)
	}
	var packs []*pack
	for range d.count(len(packID{})) {
		p, err := cat.pack(packID(d.fixed(len(packID{}))))
		if err != nil {
			return nil, 0, err
		}
		packs = append(packs, p)
	}
	for range d.count(4) {
		i := d.uint(math.MaxInt32)
		off, stored, plain := d.uint(maxPack), d.uint(maxPack), d.uint(maxBlock)
		if d.err == nil && i >= uint64(len(packs)) {
			d.fail()
		}
		if d.err != nil {
			break
		}
		b, err := cat.block(packs[i], int64(off), uint32(stored), uint32(plain))
		if err != nil {
			return nil, 0, err
		}
		d.blocks = append(d.blocks, b)
	}
	return d, d.count(2), d.err
}

func (d *decoder) extent() extent {
	i := d.uint(uint64(len(d.blocks)))
	if i == 0 {
		n := d.uint(math.MaxInt64)
		if n == 0 {
			d.fail()
		}
		return extent{hole: int64(n)}
	}
	off, n := d.uint(maxBlock), d.uint(maxChunk)
	id := chunkID(d.fixed(len(chunkID{})))
	b := d.blocks[i-1]
	if n == 0 || off+n > uint64(b.plain) {
		d.fail()
		return extent{hole: 1}
	}
	if c := d.cat.chunks[id]; c != nil && c.blk == b && c.off == uint32(off) && c.n == uint32(n) {
		return extent{c: c}
	}
	c := &chunk{id: id, blk: b, off: uint32(off), n: uint32(n)}
	if d.cat.chunks != nil {
		d.cat.chunks[id] = c
	}
	return extent{c: c}
}

func (d *decoder) extents(n int) ([]extent, int64) {
	if n == 0 {
		return nil, 0
	}
	ext := make([]extent, 0, min(n, 4096))
	size := int64(0)
	for i := range n {
		x := d.extent()
		// No writer makes two holes of one. Without them the parts are bounded by the
		// content there is.
		if d.err != nil || size > math.MaxInt64-x.size() || i > 0 && x.c == nil && ext[i-1].c == nil {
			d.fail()
			return nil, 0
		}
		size += x.size()
		ext = append(ext, x)
	}
	return ext, size
}

var errPath = errors.New("a name that cannot be")

func (d *decoder) entry(last string) (entry, error) {
	n := entry{kind: d.byte()}
	shared := int(d.uint(uint64(len(last))))
	n.path = last[:shared] + string(d.bytes(maxPath))
	if n.kind == kindLink {
		n.link = string(d.bytes(maxPath))
		if d.err == nil && (n.link == "" || !validPath(n.link)) {
			return n, errPath
		}
	} else {
		n.mode = uint32(d.uint(0o7777))
		n.uid, n.gid = uint32(d.uint(math.MaxUint32)), uint32(d.uint(math.MaxUint32))
		n.mtime = d.int()
		for range d.count(2) {
			x := xattr{name: string(d.bytes(256)), value: string(d.bytes(maxXattr))}
			if d.err == nil && (!savedXattr(x.name) || strings.IndexByte(x.name, 0) >= 0) {
				return n, fmt.Errorf("an attribute %q, which is never saved", x.name)
			}
			n.xattrs = append(n.xattrs, x)
		}
	}
	switch n.kind {
	case kindDir, kindFIFO, kindLink:
	case kindSymlink:
		n.link = string(d.bytes(maxPath))
		if d.err == nil && (n.link == "" || strings.IndexByte(n.link, 0) >= 0) {
			return n, errors.New("a symbolic link to nowhere")
		}
	case kindFile:
		n.size = int64(d.uint(math.MaxInt64))
		n.lists = d.uint(1) == 1
		var sum int64
		n.ext, sum = d.extents(d.count(2))
		if d.err == nil && !n.lists && sum != n.size {
			return n, errors.New("a file whose parts do not make its size")
		}
		if d.err == nil && n.lists && slices.ContainsFunc(n.ext, func(x extent) bool { return x.c == nil }) {
			return n, errors.New("a hole where a list should be")
		}
	default:
		if d.err == nil {
			return n, fmt.Errorf("an entry of unknown kind %q: use a newer cloudcode", n.kind)
		}
	}
	if d.err == nil && !validPath(n.path) {
		return n, errPath
	}
	return n, d.err
}

// validPath: relative, no empty, "." or ".." part; "" is the tree.
func validPath(p string) bool {
	if p == "" {
		return true
	}
	if len(p) > maxPath || strings.IndexByte(p, 0) >= 0 {
		return false
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == "" || part == "." || part == ".." || len(part) > 255 {
			return false
		}
	}
	return true
}

// decodeSegment appends the entries of a segment's text, limit of them at most, which
// follow those that are there.
func decodeSegment(cat *catalog, text []byte, limit int, into []entry) ([]entry, error) {
	d, n, err := newDecoder(cat, text)
	if err != nil {
		return into, err
	}
	if n > limit {
		return into, fmt.Errorf("%d entries, more than the %d allowed", n, limit)
	}
	last, paths := "", 0
	for i := range n {
		e, err := d.entry(last)
		if err != nil {
			return into, fmt.Errorf("entry %d behind %q: %w", i, last, err)
		}
		if len(into) > 0 && comparePaths(into[len(into)-1].path, e.path) >= 0 {
			return into, fmt.Errorf("%q is out of order", e.path)
		}
		if paths += len(e.path); paths > maxSegmentPaths {
			return into, errors.New("its paths are too long")
		}
		last = e.path
		into = append(into, e)
	}
	if len(d.b) != 0 {
		return into, fmt.Errorf("%d bytes too many", len(d.b))
	}
	return into, nil
}

// decodeList reads a list of extents.
func decodeList(cat *catalog, text []byte, into []extent) ([]extent, error) {
	d, n, err := newDecoder(cat, text)
	if err != nil {
		return into, err
	}
	ext, _ := d.extents(n)
	if d.err == nil && (len(d.b) != 0 || len(ext) > 0 && len(into) > 0 && ext[0].c == nil && into[len(into)-1].c == nil) {
		d.fail()
	}
	return append(into, ext...), d.err
}

// checkTree says whether entries, which are in order, can be a tree: each below a
// folder that is there, further names of files that are there before.
func checkTree(entries []entry) error {
	if len(entries) == 0 || entries[0].path != "" || entries[0].kind != kindDir {
		return errors.New("it does not begin with the tree's own folder")
	}
	var dirs []string // from the root down to the last entry's
	files := map[string]bool{}
	linked := false
	for _, e := range entries {
		linked = linked || e.kind == kindLink
	}
	for i, e := range entries {
		if i == 0 {
			dirs = append(dirs, "")
			continue
		}
		parent := ""
		if j := strings.LastIndexByte(e.path, '/'); j >= 0 {
			parent = e.path[:j]
		}
		for len(dirs) > 0 && dirs[len(dirs)-1] != parent {
			dirs = dirs[:len(dirs)-1]
		}
		if len(dirs) == 0 {
			return fmt.Errorf("%q is in no folder", e.path)
		}
		switch e.kind {
		case kindDir:
			dirs = append(dirs, e.path)
		case kindFile:
			if linked {
				files[e.path] = true
			}
		case kindLink:
			if !files[e.link] {
				return fmt.Errorf("%q is a further name of %q, which is no file before it", e.path, e.link)
			}
		}
	}
	return nil
}
