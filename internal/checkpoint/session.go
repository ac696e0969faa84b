package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Manifest reads one checkpoint's manifest. Returns ErrNotFound, ErrDamaged, ErrKey.
func (s *Session) Manifest(ctx context.Context, id string) (*Manifest, error) {
	if s.err != nil {
		return nil, s.err
	}
	if !manifestID.MatchString(id) {
		return nil, fmt.Errorf("%w: %q is no id of a checkpoint", ErrNotFound, id)
	}
	text, _, err := s.r.store.Get(ctx, s.key(id))
	if errors.Is(err, objstore.ErrTooLarge) {
		return nil, fmt.Errorf("%s: %w: %w", s.key(id), ErrDamaged, err)
	}
	if errors.Is(err, objstore.ErrNotFound) {
		return nil, fmt.Errorf("%w: %s of %q", ErrNotFound, id, s.prefix)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.key(id), err)
	}
	m, err := s.r.crypt.decodeManifest(s.escaped, id, text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.key(id), err)
	}
	return m, nil
}

// ids lists the session's checkpoints, oldest first. Manifests behind the head were
// never made its own (their writer was stopped in between): they are not counted.
func (s *Session) ids(ctx context.Context, head Head) ([]objstore.Object, error) {
	all, _, err := s.idsAndBehind(ctx, head)
	return all, err
}

// idsAndBehind also gives those that are behind the head.
func (s *Session) idsAndBehind(ctx context.Context, head Head) (all, behind []objstore.Object, err error) {
	for o, err := range s.r.store.List(ctx, s.manifests(), "", "") {
		if err != nil {
			return nil, nil, fmt.Errorf("list checkpoints of %q: %w", s.prefix, err)
		}
		o.Key = strings.TrimPrefix(o.Key, s.manifests())
		switch {
		case !manifestID.MatchString(o.Key):
		case o.Key <= head.Manifest:
			all = append(all, o)
		default:
			behind = append(behind, o)
		}
	}
	return all, behind, nil
}

// List gives the session's checkpoints, newest first. One that cannot be read has
// its trouble in Notes. Returns ErrNotFound if there is no such session.
func (s *Session) List(ctx context.Context) ([]Info, error) {
	head, err := s.Head(ctx)
	if err != nil {
		return nil, err
	}
	found, err := s.ids(ctx, head)
	if err != nil {
		return nil, err
	}
	return s.infos(ctx, found)
}

func (s *Session) infos(ctx context.Context, found []objstore.Object) ([]Info, error) {
	slices.Reverse(found)
	out := make([]Info, len(found))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchWorkers)
	for i, o := range found {
		g.Go(func() (err error) {
			out[i], err = s.info(ctx, o)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	// A manifest that retention removed meanwhile has no id.
	return slices.DeleteFunc(out, func(i Info) bool { return i.ID == "" }), nil
}

func (s *Session) info(ctx context.Context, o objstore.Object) (Info, error) {
	key := s.key(o.Key)
	s.r.mu.Lock()
	known, ok := s.r.infos[key]
	s.r.mu.Unlock()
	if ok && known.etag == o.ETag {
		return known.info, nil
	}
	m, err := s.Manifest(ctx, o.Key)
	switch {
	case errors.Is(err, ErrNotFound):
		return Info{}, nil
	case errors.Is(err, ErrDamaged), errors.Is(err, ErrKey):
		t, _ := idTime(o.Key)
		return Info{ID: o.Key, Time: t, Notes: []string{err.Error()}}, nil
	case err != nil:
		return Info{}, err
	}
	if i := m.Info; len(i.SessionJSON)+len(i.Trigger)+len(i.OpenCodeVersion)+len(i.Mode)+len(i.Restored)+len(i.Node)+len(i.Parent) > maxInfo {
		return i, nil // not to be remembered
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if len(s.r.infos) >= maxInfos {
		clear(s.r.infos)
	}
	s.r.infos[key] = cachedInfo{o.ETag, m.Info}
	return m.Info, nil
}

// Find gives the id that begins with the text, if there is one only; "" is the
// newest. Returns ErrNotFound.
func (s *Session) Find(ctx context.Context, prefix string) (string, error) {
	head, err := s.Head(ctx)
	if err != nil {
		return "", err
	}
	if prefix == "" || prefix == head.Manifest {
		if head.Manifest == "" {
			return "", fmt.Errorf("%w: %q has none yet", ErrNotFound, s.prefix)
		}
		return head.Manifest, nil
	}
	found, err := s.ids(ctx, head)
	if err != nil {
		return "", err
	}
	var match []string
	for _, o := range found {
		if o.Key == prefix {
			return prefix, nil
		}
		if strings.HasPrefix(o.Key, prefix) {
			match = append(match, o.Key)
		}
	}
	switch len(match) {
	case 0:
		return "", fmt.Errorf("%w: none of %q begins with %q", ErrNotFound, s.prefix, prefix)
	case 1:
		return match[0], nil
	}
	return "", fmt.Errorf("%w: %d begin with %q, for instance %s and %s: give more of it", ErrNotFound, len(match), prefix, match[0], match[1])
}

// CopyFrom makes this session begin with a checkpoint of another of the same root.
// No file is copied. o becomes the owner of a head that is released, so that the
// first real owner can take it; the generation must not be lower than of what was
// purged here. Returns ErrExists if there is a session.
func (s *Session) CopyFrom(ctx context.Context, src *Session, id string, o Owner, meta Meta) (Info, error) {
	if s.err != nil {
		return Info{}, s.err
	}
	if src.r.store != s.r.store || src.r.base != s.r.base {
		return Info{}, fmt.Errorf("copy checkpoint %s of %q: the two sessions are in different places of object storage", id, src.prefix)
	}
	before, err := s.Head(ctx)
	if err == nil && (!before.Purged() || before.Owner.Generation > o.Generation) {
		return Info{}, fmt.Errorf("%w: %q has %s", ErrExists, s.prefix, before.Owner)
	} else if err != nil && !errors.Is(err, ErrNotFound) {
		return Info{}, err
	}
	m, err := src.Manifest(ctx, id)
	if err != nil {
		return Info{}, err
	}
	m.session, m.Parent, m.Owner, m.Meta, m.UploadedBytes = s.escaped, id, o, meta, 0
	m.Generation, m.Node = o.Generation, o.Node
	m.ID, m.Time = newManifestID(time.Now(), id)
	text, err := s.r.crypt.encodeManifest(m)
	if err != nil {
		return Info{}, err
	}
	if _, err := s.r.store.Put(ctx, s.key(m.ID), text, objstore.PutOptions{}); err != nil {
		return Info{}, fmt.Errorf("write %s: %w", s.key(m.ID), err)
	}
	// The copy was there before this look: garbage collection that did not see the
	// copy saw the source.
	_, err = s.r.store.Stat(ctx, src.key(id))
	if err == nil {
		_, err = s.write(ctx, before, Head{Owner: o, Manifest: m.ID, Restored: meta.Restored, Released: true})
	}
	switch {
	case err == nil:
		return m.Info, nil
	case errors.Is(err, objstore.ErrNotFound):
		err = fmt.Errorf("%w: %s of %q was removed meanwhile", ErrNotFound, id, src.prefix)
	case errors.Is(err, errLost):
		err = fmt.Errorf("%w: %q has checkpoints", ErrExists, s.prefix)
	case errors.Is(err, objstore.ErrUnavailable):
		return Info{}, err // the head may be there: its manifest must stay
	}
	return Info{}, errors.Join(err, s.r.store.Delete(context.WithoutCancel(ctx), s.key(m.ID)))
}

// Purge removes the checkpoints of a session that o owns: see Retire. Their packs go by
// garbage collection, as far as no other session needs them. The head stays, as one
// that is Purged. Returns ErrFenced, and then has removed nothing.
func (s *Session) Purge(ctx context.Context, o Owner) error { return s.purge(ctx, o, nil) }

// Discard takes back what CopyFrom has made for o. What another owner has by now stays.
func (s *Session) Discard(ctx context.Context, o Owner) error {
	h, err := s.Head(ctx)
	if errors.Is(err, ErrNotFound) && s.err == nil || err == nil && (h.Owner != o || !h.copied()) {
		return nil
	}
	if err != nil {
		return err
	}
	err = s.purge(ctx, o, []string{s.key(h.Manifest)})
	if errors.Is(err, ErrFenced) {
		return nil
	}
	return err
}

// purge removes these manifests, or all that there are.
func (s *Session) purge(ctx context.Context, o Owner, keys []string) error {
	if s.err != nil {
		return s.err
	}
	// Listed first: what another makes here once the head can be taken stays.
	if keys == nil {
		for m, err := range s.r.store.List(ctx, s.manifests(), "", "") {
			if err != nil {
				return fmt.Errorf("list checkpoints of %q: %w", s.prefix, err)
			}
			keys = append(keys, m.Key)
		}
	}
	// The head goes first: it must name nothing that is removed.
	if _, _, err := s.update(ctx, func(h *Head, exists bool) (bool, error) {
		if !exists {
			return false, s.missing()
		}
		if err := s.owns(*h, o); err != nil || h.Purged() {
			return false, err
		}
		h.Manifest, h.Restored, h.Released = "", "", true
		if h.DeleteTime.IsZero() {
			h.DeleteTime = time.Now()
		}
		return true, nil
	}); err != nil {
		return fmt.Errorf("remove checkpoints of %q: %w", s.prefix, err)
	}
	if err := s.r.store.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("remove checkpoints of %q: %w", s.prefix, err)
	}
	return nil
}
