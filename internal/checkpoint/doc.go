// Package checkpoint keeps consistent points of a session's files in an object
// store: content-addressed, compressed, perhaps encrypted chunks in packs; a manifest
// for each checkpoint; and a head per session, moved by conditional writes, which is
// also the mark of who owns the session. docs/checkpoints.md has the format.
//
// Below <root>/.cloudcode/v1/:
//
//	packs/<2 hex>/<pack id>               shared by all sessions of the root
//	sessions/<prefix>/head                JSON; moved by If-Match only
//	sessions/<prefix>/manifests/<id>      never changed
//	clock                                 garbage collection reads the store's time from it
//
// In <prefix>, "/" is "!", and "" is "_root".
//
// The order of writes is what makes a checkpoint safe: packs, then the manifest that
// names them, then the head. What is seen of a checkpoint is whole.
package checkpoint
