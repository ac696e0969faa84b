package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The cache is the writer's picture of the tree as of its last Save. The journal
// lists packs that were uploaded and that no checkpoint names yet. Both are believed
// only with a right checksum, and only as far as the packs they name are safe; all
// they save is time.
const (
	cacheFile    = "tree"
	journalFile  = "uploads"
	cacheMagic   = "cccache3"
	maxCache     = 4 << 30
	cacheEvery   = time.Minute
	cacheBytes   = 32 << 20
	maxCacheDeep = maxTreePath
)

type cacheState struct {
	written time.Time
	read    int64 // bytes of files read since
	journal *os.File
}

// keepCache writes the cache if it is much behind.
func (w *Writer) keepCache() error {
	w.cache.read += w.read.Load()
	if time.Since(w.cache.written) < cacheEvery && w.cache.read < cacheBytes {
		return nil
	}
	return w.saveCache()
}

func (w *Writer) cacheHead() []byte {
	b := append([]byte(cacheMagic), w.s.r.crypt.keyID[:]...)
	b = binary.LittleEndian.AppendUint32(b, w.o.IDBase)
	return appendBytes(b, w.s.r.base+w.s.escaped)
}

func (w *Writer) saveCache() error {
	if w.o.StateDir == "" {
		return nil
	}
	manifest := ""
	if w.base != nil {
		manifest = w.base.ID
	}
	enc := newEncoder()
	enc.body = appendBytes(enc.body, manifest)
	enc.body = append(enc.body, flag(w.dirty))
	cacheDir(enc, w.tree)
	out := append(w.cacheHead(), enc.bytes()...)
	sum := sha256.Sum256(out)
	out = append(out, sum[:]...)
	// Not synced: a torn file has a wrong checksum.
	name := filepath.Join(w.o.StateDir, cacheFile)
	if err := os.WriteFile(name+".new", out, 0o600); err != nil {
		return fmt.Errorf("write the cache of checkpoints: %w", err)
	}
	w.cache.written, w.cache.read = time.Now(), 0
	return os.Rename(name+".new", name)
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func (e *encoder) sig(s sig) {
	for _, v := range []uint64{s.dev, s.ino, uint64(s.size), uint64(s.mtime), uint64(s.ctime)} {
		e.body = binary.LittleEndian.AppendUint64(e.body, v)
	}
	for _, v := range []uint32{s.mode, s.uid, s.gid} {
		e.body = binary.LittleEndian.AppendUint32(e.body, v)
	}
	e.body = append(e.body, flag(s.many))
}

func (d *decoder) sig() (s sig) {
	b := d.fixed(sigSize)
	if d.err != nil {
		return s
	}
	le := binary.LittleEndian
	return sig{
		dev: le.Uint64(b), ino: le.Uint64(b[8:]), size: int64(le.Uint64(b[16:])), mtime: int64(le.Uint64(b[24:])), ctime: int64(le.Uint64(b[32:])),
		mode: le.Uint32(b[40:]), uid: le.Uint32(b[44:]), gid: le.Uint32(b[48:]), many: b[52] != 0,
	}
}

const sigSize = 5*8 + 3*4 + 1

func (e *encoder) xattrs(all []xattr) {
	e.body = binary.AppendUvarint(e.body, uint64(len(all)))
	for _, x := range all {
		e.body = appendBytes(e.body, x.name)
		e.body = appendBytes(e.body, x.value)
	}
}

func (d *decoder) xattrs() (all []xattr) {
	for range d.count(2) {
		all = append(all, xattr{string(d.bytes(256)), string(d.bytes(maxXattr))})
	}
	return all
}

func cacheDir(e *encoder, d *dir) {
	e.sig(d.sig)
	e.body = append(e.body, flag(d.racy))
	e.xattrs(d.xattrs)
	e.body = binary.AppendUvarint(e.body, uint64(len(d.nodes)))
	for _, n := range d.nodes {
		e.body = appendBytes(e.body, n.name)
		e.body = append(e.body, n.kind)
		if n.sub != nil {
			cacheDir(e, n.sub)
			continue
		}
		e.sig(n.sig)
		e.body = append(e.body, flag(n.racy))
		e.body = appendBytes(e.body, n.link)
		e.xattrs(n.xattrs)
		c := n.content
		if c == nil || !c.placed() {
			e.body = append(e.body, 0)
			continue
		}
		e.body = append(e.body, 1)
		e.extents(c.ext)
		e.extents(c.lists)
	}
}

// placed: all its chunks are in packs that are in the store.
func (c *content) placed() bool {
	bad := func(x extent) bool { return x.c != nil && (x.c.blk.pack == nil || x.c.blk.pack.lost) }
	return !slices.ContainsFunc(c.ext, bad) && !slices.ContainsFunc(c.lists, bad)
}

func (d *decoder) cachedDir(depth int) *dir {
	if depth > maxCacheDeep {
		d.fail()
		return nil
	}
	// Not whole: it is listed again, in case what is excluded has changed.
	k := &dir{sig: d.sig(), racy: d.byte() != 0, xattrs: d.xattrs()}
	for range d.count(2) {
		n := &node{name: string(d.bytes(255)), kind: d.byte()}
		if n.kind == kindDir {
			if n.sub = d.cachedDir(depth + 1); n.sub == nil {
				return nil
			}
		} else {
			n.sig, n.racy, n.link, n.xattrs = d.sig(), d.byte() != 0, string(d.bytes(maxPath)), d.xattrs()
			if d.byte() != 0 {
				c := &content{}
				c.ext, c.size = d.extents(d.count(2))
				c.lists, _ = d.extents(d.count(2))
				for _, x := range c.ext {
					if x.c != nil {
						c.data += int64(x.c.n)
					}
				}
				n.content = c
			}
		}
		if d.err != nil || len(k.nodes) > 0 && k.nodes[len(k.nodes)-1].name >= n.name {
			d.fail()
			return nil
		}
		k.nodes = append(k.nodes, n)
	}
	return k
}

// catalog of all that is safe to refer to so far.
func (w *Writer) catalog() *catalog {
	cat := newCatalog()
	if w.base != nil {
		cat = w.base.cat
		cat.closed = false
	}
	for _, p := range w.packs {
		cat.packs[p.id] = p
	}
	cat.chunks = w.index
	return cat
}

// loadCache says whether the cache was of the head's checkpoint: then the base's
// entries need not be read.
func (w *Writer) loadCache() bool {
	if w.o.StateDir == "" {
		return false
	}
	text, err := os.ReadFile(filepath.Join(w.o.StateDir, cacheFile))
	if err != nil {
		return false
	}
	head := w.cacheHead()
	if len(text) < len(head)+sha256.Size || !bytes.HasPrefix(text, head) {
		return false
	}
	body, sum := text[:len(text)-sha256.Size], text[len(text)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		w.log.Warn("the cache of checkpoints is damaged: all files are read again", "dir", w.o.StateDir)
		return false
	}
	cat := w.catalog()
	safe := map[*pack]bool{}
	for _, p := range w.packs {
		safe[p] = true
	}
	d, _, err := newDecoder(cat, body[len(head):])
	if err != nil {
		return false
	}
	manifest, dirty := string(d.bytes(256)), d.byte() != 0
	tree := d.cachedDir(0)
	for id, p := range cat.packs {
		if !safe[p] {
			p.lost = true
			delete(cat.packs, id)
		}
	}
	if tree == nil || d.err != nil || len(d.b) != 0 {
		w.forget()
		return false
	}
	w.tree = tree
	w.forget()
	w.prune("", tree)
	if w.base == nil || w.base.ID != manifest {
		return false
	}
	w.dirty = dirty
	return true
}

// prune drops what is excluded now and was not when the cache was written.
func (w *Writer) prune(path string, d *dir) {
	if w.o.Exclude == nil {
		return
	}
	d.nodes = slices.DeleteFunc(d.nodes, func(n *node) bool {
		path := join(path, n.name)
		if w.o.Exclude(path, n.sub != nil) {
			w.dirty = true
			return true
		}
		if n.sub != nil {
			w.prune(path, n.sub)
		}
		return false
	})
}

// arrived notes a pack that is in the store. The packer's lock is held.
func (w *Writer) arrived(p *pack, blocks []packBlock) {
	w.packs = append(w.packs, p)
	if w.o.StateDir == "" {
		return
	}
	if w.cache.journal == nil {
		f, err := os.OpenFile(filepath.Join(w.o.StateDir, journalFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			w.log.Warn("no journal of uploads: after a restart they are sent again", "error", err)
			return
		}
		w.cache.journal = f
	}
	b := append([]byte(nil), p.id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.uploaded.UnixNano()))
	b = appendPackIndex(b, blocks)
	sum := sha256.Sum256(append(w.cacheHead(), b...))
	rec := binary.LittleEndian.AppendUint32(nil, uint32(len(b)))
	rec = append(append(rec, sum[:]...), b...)
	if _, err := w.cache.journal.Write(rec); err != nil {
		w.log.Warn("journal of uploads: after a restart they are sent again", "error", err)
	}
}

// keepJournal empties the journal once a checkpoint names all that is in it.
func (w *Writer) keepJournal() {
	if w.o.StateDir == "" || slices.ContainsFunc(w.packs, func(p *pack) bool { return !p.committed }) {
		return
	}
	err := os.Truncate(filepath.Join(w.o.StateDir, journalFile), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.log.Warn("empty the journal of uploads", "error", err)
	}
}

// loadJournal takes up uploads of a process that ended before its checkpoint.
func (w *Writer) loadJournal() {
	if w.o.StateDir == "" {
		return
	}
	text, err := os.ReadFile(filepath.Join(w.o.StateDir, journalFile))
	if err != nil {
		return
	}
	cat := w.catalog()
	old := time.Now().Add(-w.o.Grace / 2)
	for len(text) >= 4+sha256.Size {
		n := binary.LittleEndian.Uint32(text)
		if uint64(n) > uint64(len(text)-4-sha256.Size) {
			return
		}
		sum, b := text[4:4+sha256.Size], text[4+sha256.Size:][:n]
		if got := sha256.Sum256(append(w.cacheHead(), b...)); !bytes.Equal(got[:], sum) {
			return
		}
		text = text[4+sha256.Size+int(n):]
		r := wire{b: b}
		p := &pack{id: packID(r.fixed(len(packID{}))), uploaded: time.Unix(0, int64(binary.LittleEndian.Uint64(r.fixed(8))))}
		blocks, err := decodePackIndex(r.b)
		if r.err != nil || err != nil {
			return
		}
		if cat.packs[p.id] != nil || p.uploaded.Before(old) || p.uploaded.After(time.Now()) {
			continue
		}
		cat.packs[p.id] = p
		w.packs = append(w.packs, p)
		off := int64(packHeader)
		for _, k := range blocks {
			blk := &block{pack: p, off: off, stored: k.stored, plain: k.plain, kind: k.kind}
			cat.blocks[place{p, off}] = blk
			off += int64(k.stored)
			p.size += int64(k.stored)
			p.plain += int64(k.plain)
			at := uint32(0)
			for _, c := range k.chunks {
				if have := w.index[c.id]; have == nil || !have.usable() {
					w.index[c.id] = &chunk{id: c.id, blk: blk, off: at, n: c.n}
				}
				at += c.n
			}
		}
	}
}
