package checkpoint

import (
	"bytes"
	"testing"
	"time"
)

// sample is one of each object, and of the texts inside.
func sample(t testing.TB) (c *cryptor, manifest, segment, list, trailer, head []byte) {
	t.Helper()
	c, err := newCryptor(nil)
	must(t, err)
	p := &pack{id: packID{1, 2, 3}, size: 1000, plain: 2000}
	b := &block{pack: p, off: int64(packHeader), stored: 500, plain: 900, kind: kindData}
	ch := &chunk{id: c.id([]byte("x")), blk: b, off: 3, n: 300}
	enc := newEncoder()
	for _, e := range []entry{
		{kind: kindDir, mode: 0o755, xattrs: []xattr{{"user.a", "b"}}},
		{path: "a", kind: kindFile, size: 310, ext: []extent{{c: ch}, {hole: 10}}, mtime: -5},
		{path: "b", kind: kindLink, link: "a"},
		{path: "c", kind: kindSymlink, link: "../x"},
		{path: "d", kind: kindFIFO},
		{path: "e", kind: kindFile, size: 1 << 40, ext: []extent{{c: ch}}, lists: true},
	} {
		enc.entry(&e)
	}
	segment = enc.bytes()
	enc.reset()
	for _, x := range []extent{{c: ch}, {hole: 1 << 40}} {
		enc.extent(x)
		enc.count++
	}
	list = enc.bytes()
	// The same in every process: fuzzing has several.
	id, at := "20261124t214900.123z-abcdefgh", time.Unix(1, 0)
	m := &Manifest{Info: Info{ID: id, Time: at}, session: "s", segments: []*chunk{ch}, packs: []*pack{p}}
	manifest, err = c.encodeManifest(m)
	must(t, err)
	body := c.packHeader(p.id)
	sealed := c.seal("block", nil, []byte("xy"))
	body = append(body, sealed...)
	trailer = append(body, c.packTrailer(p.id, []packBlock{{kindData, uint32(len(sealed)), 2, []packChunk{{c.id([]byte("x")), 1}, {c.id([]byte("y")), 1}}}})...)
	return c, manifest, segment, list, trailer, encodeHead(Head{Owner: owner1, Manifest: id, DeleteTime: at})
}

// What a decoder accepts, it writes the same way again.

func FuzzManifest(f *testing.F) {
	c, manifest, _, _, _, _ := sample(f)
	m, err := c.decodeManifest("s", idOf(f, c, manifest), manifest)
	must(f, err)
	id := m.ID
	f.Add(manifest)
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := c.decodeManifest("s", id, text)
		if err != nil {
			return
		}
		again, err := c.encodeManifest(m)
		must(t, err)
		if _, err := c.decodeManifest("s", id, again); err != nil {
			t.Error(err)
		}
	})
}

func idOf(t testing.TB, c *cryptor, manifest []byte) string {
	t.Helper()
	_, _, body, err := manifestPacks(manifest)
	must(t, err)
	plain, err := c.open("manifest", nil, body, -maxManifest)
	must(t, err)
	_, rest, _ := bytes.Cut(plain, []byte(`"id":"`))
	id, _, _ := bytes.Cut(rest, []byte(`"`))
	return string(id)
}

// The body of a manifest, as if its checksum had been made to fit.
func FuzzManifestBody(f *testing.F) {
	c, manifest, _, _, _, _ := sample(f)
	id := idOf(f, c, manifest)
	head, packs, body, err := manifestPacks(manifest)
	must(f, err)
	f.Add(body)
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := c.decodeBody("s", id, head, packs, body)
		if err == nil && len(m.segments) == 0 {
			t.Error("a manifest without entries")
		}
	})
}

func FuzzSegment(f *testing.F) {
	_, _, segment, _, _, _ := sample(f)
	f.Add(segment)
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := decodeSegment(newCatalog(), text, segmentMax, nil)
		if err != nil {
			return
		}
		enc := newEncoder()
		for i := range all {
			enc.entry(&all[i])
		}
		again, err := decodeSegment(newCatalog(), enc.bytes(), segmentMax, nil)
		if err != nil || len(again) != len(all) {
			t.Errorf("%d entries became %d: %v", len(all), len(again), err)
		}
		if checkTree(all) == nil {
			for _, e := range all {
				if !validPath(e.path) {
					t.Errorf("path %q", e.path)
				}
			}
		}
	})
}

func FuzzList(f *testing.F) {
	_, _, _, list, _, _ := sample(f)
	f.Add(list)
	f.Fuzz(func(t *testing.T, text []byte) {
		ext, err := decodeList(newCatalog(), text, nil)
		for _, x := range ext {
			if err == nil && x.size() <= 0 {
				t.Error("an extent without size")
			}
		}
	})
}

func FuzzPack(f *testing.F) {
	c, _, _, _, text, _ := sample(f)
	id := packID(text[packHeader-16 : packHeader])
	_, err := c.readPackIndex(id, text)
	must(f, err)
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		blocks, err := c.readPackIndex(id, text)
		if err != nil {
			return
		}
		n := packHeader
		for _, b := range blocks {
			n += int(b.stored)
		}
		if n > len(text) {
			t.Error("blocks behind the end")
		}
	})
}

func FuzzPackIndex(f *testing.F) {
	c, _, _, _, text, _ := sample(f)
	blocks, err := c.readPackIndex(packID(text[packHeader-16:packHeader]), text)
	must(f, err)
	f.Add(appendPackIndex(nil, blocks))
	f.Fuzz(func(t *testing.T, text []byte) {
		blocks, err := decodePackIndex(text)
		if err != nil {
			return
		}
		again, err := decodePackIndex(appendPackIndex(nil, blocks))
		if err != nil || len(again) != len(blocks) {
			t.Errorf("%d blocks became %d: %v", len(blocks), len(again), err)
		}
	})
}

func FuzzHead(f *testing.F) {
	_, _, _, _, _, head := sample(f)
	_, err := decodeHead(head)
	must(f, err)
	f.Add(head)
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := decodeHead(text)
		if err != nil {
			return
		}
		if again, err := decodeHead(encodeHead(h)); err == nil && again.Manifest != h.Manifest {
			t.Errorf("%+v became %+v", h, again)
		}
	})
}
